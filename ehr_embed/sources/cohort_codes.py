"""The conditions, laboratory tests and other codes of the synthetic cohort, and the weights by which they raise the risk.

No data of patients are used: prevalences, values and weights are invented; only the names of conditions, drugs and
laboratory tests are real.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Condition:
    """Chronic condition of the cohort.

    The texts of one condition's codes are synonyms. A model that reads texts can pool them; a model that sees only ids
    cannot.

    Attributes:
        name: name of the condition.
        prevalence: share of the subjects aged 60 to 69 that have it; it grows with age.
        weight: weight in the log-odds of the outcome.
        diagnoses: code and text of its diagnoses.
        drugs: code and text of its drugs.
    """

    name: str
    prevalence: float
    weight: float
    diagnoses: tuple[tuple[str, str], ...]
    drugs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Lab:
    """Laboratory test of the cohort.

    Attributes:
        code, text: code and text of the test.
        mean, sd: mean and standard deviation of its values between subjects, in the unit that `text` names.
        weight: change in the log-odds of the outcome per standard deviation.
        shifts: name of a condition, and the shift of the mean under it in standard deviations.
    """

    code: str
    text: str
    mean: float
    sd: float
    weight: float = 0.0
    shifts: tuple[tuple[str, float], ...] = ()


CONDITIONS = (
    Condition(
        "heart_failure",
        0.14,
        2.2,
        (
            ("ICD10CM//I50.9", "Heart failure, unspecified"),
            ("ICD10CM//I50.22", "Chronic systolic heart failure"),
            ("ICD10CM//I50.32", "Chronic diastolic heart failure"),
            ("ICD10CM//I50.1", "Left ventricular failure"),
        ),
        (("ATC//C03CA01", "Furosemide"), ("ATC//C09DX04", "Sacubitril and valsartan")),
    ),
    Condition(
        "kidney",
        0.16,
        1.6,
        (
            ("ICD10CM//N18.3", "Chronic kidney disease, stage 3"),
            ("ICD10CM//N18.4", "Chronic kidney disease, stage 4"),
            ("ICD10CM//N18.9", "Chronic kidney disease, unspecified"),
        ),
        (("ATC//B03XA01", "Erythropoietin"), ("ATC//V03AE02", "Sevelamer")),
    ),
    Condition(
        "lung",
        0.17,
        1.5,
        (
            ("ICD10CM//J44.9", "Chronic obstructive pulmonary disease"),
            ("ICD10CM//J43.9", "Emphysema"),
            ("ICD10CM//J42", "Chronic bronchitis"),
        ),
        (("ATC//R03BB04", "Tiotropium inhaler"), ("ATC//R03AK07", "Formoterol and budesonide inhaler")),
    ),
    Condition(
        "diabetes",
        0.22,
        0.8,
        (
            ("ICD10CM//E11.9", "Type 2 diabetes mellitus without complications"),
            ("ICD10CM//E11.65", "Type 2 diabetes mellitus with hyperglycemia"),
        ),
        (("ATC//A10BA02", "Metformin"), ("ATC//A10AE04", "Insulin glargine")),
    ),
    Condition(
        "hypertension",
        0.40,
        0.0,
        (("ICD10CM//I10", "Essential hypertension"), ("ICD10CM//I11.9", "Hypertensive heart disease")),
        (("ATC//C08CA01", "Amlodipine"), ("ATC//C09AA05", "Ramipril")),
    ),
    Condition(
        "depression",
        0.18,
        0.0,
        (("ICD10CM//F32.9", "Major depressive disorder, single episode"), ("ICD10CM//F33.1", "Recurrent depression")),
        (("ATC//N06AB06", "Sertraline"),),
    ),
    Condition(
        "arthritis",
        0.25,
        0.0,
        (("ICD10CM//M17.9", "Osteoarthritis of the knee"), ("ICD10CM//M16.9", "Osteoarthritis of the hip")),
        (("ATC//M01AE01", "Ibuprofen"), ("ATC//N02BE01", "Paracetamol")),
    ),
    Condition(
        "reflux",
        0.20,
        0.0,
        (("ICD10CM//K21.9", "Gastro-oesophageal reflux disease"),),
        (("ATC//A02BC01", "Omeprazole"),),
    ),
    Condition(
        "thyroid",
        0.10,
        0.0,
        (("ICD10CM//E03.9", "Hypothyroidism"),),
        (("ATC//H03AA01", "Levothyroxine"),),
    ),
    Condition(
        "asthma",
        0.09,
        0.0,
        (("ICD10CM//J45.909", "Asthma, uncomplicated"),),
        (("ATC//R03AC02", "Salbutamol inhaler"),),
    ),
)
LABS = (
    Lab("LOINC//2160-0", "Creatinine, mg/dL", 0.95, 0.22, 0.6, (("kidney", 2.0),)),
    Lab("LOINC//718-7", "Hemoglobin, g/dL", 13.8, 1.4, -0.6, (("kidney", -1.0),)),
    Lab("LOINC//33762-6", "NT-proBNP, pg/mL", 250.0, 110.0, 0.5, (("heart_failure", 2.0),)),
    Lab("LOINC//4548-4", "Hemoglobin A1c, %", 5.6, 0.5, 0.0, (("diabetes", 2.5),)),
    Lab("LOINC//2951-2", "Sodium, mmol/L", 139.5, 2.6),
    Lab("LOINC//2823-3", "Potassium, mmol/L", 4.2, 0.4),
    Lab("LOINC//6690-2", "Leukocytes, 10^3/uL", 7.2, 1.8),
    Lab("LOINC//8480-6", "Systolic blood pressure, mmHg", 128.0, 13.0, 0.0, (("hypertension", 1.2),)),
    Lab("LOINC//8867-4", "Heart rate, beats per minute", 74.0, 10.0),
    Lab("LOINC//29463-7", "Body weight, kg", 79.0, 15.0),
)
AGE_BANDS = ("40-49", "50-59", "60-69", "70-79", "80-89")
AGE_WEIGHT = 0.45
"""Change in the log-odds of the outcome per decade of age."""
DEMOGRAPHICS = (
    ("SEX//F", "Female"),
    ("SEX//M", "Male"),
    *((f"AGE//{band}", f"Age {band.replace('-', ' to ')} years at the first visit") for band in AGE_BANDS),
)
VISITS = (("VISIT//outpatient", "Outpatient visit"), ("VISIT//telephone", "Telephone consultation"))
INJURY = ("ICD10CM//S00-T88", "Injury")
RARE = tuple(
    (f"ICD10CM//{code}", text)
    for code, text in (
        ("S52.5", "Fracture of the lower end of the radius"),
        ("S82.6", "Fracture of the lateral malleolus"),
        ("S93.4", "Sprain of the ankle"),
        ("S61.2", "Laceration of a finger"),
        ("T23.1", "Burn of the wrist and hand, first degree"),
        ("S06.0", "Concussion"),
    )
)
OUTCOMES = (
    ("ADMISSION//emergency", "Emergency hospital admission"),
    ("ADMISSION//icu", "Admission to the intensive care unit"),
    ("DISCHARGE//died", "Died in hospital"),
)
"""Events that record the outcome after the prediction time; a model that sees them exceeds the best possible AUROC."""
