"""A run folder of a stranger: attacks on what its stored configuration may build, each refused before anything ran."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import ehr_embed
from ehr_embed.config.instantiate import check_stored, instantiate, instantiate_embedder
from ehr_embed.core.errors import UserError
from ehr_embed.inference.trained_run import open_run, trained_on
from tests.helpers.configs import composed
from tests.helpers.entry_points import inside  # noqa: F401 (fixture)
from tests.helpers.ward import SMALL, stored, trained, ward  # noqa: F401 (fixtures)

EVIL = "from pathlib import Path\nPath('pwned').touch()\n"
ENCODER = "ehr_embed.models.encoder.Encoder"
FA4 = "torch.nn.attention._fa4.register_flash_attention_fa4"
SHUFFLED = "ehr_embed.embedders.shuffled_text.ShuffledTextEmbedder"
HASHING = "ehr_embed.embedders.hashing.HashingEmbedder"
MEDS = "ehr_embed.sources.meds.MedsSource"


def named(target: Any, **keys: Any) -> dict[str, Any]:
    return {"_target_": target, **keys}


EVIL_IMPORT = named(FA4, module_path="evil")
ATTACKS: list[tuple[str, Any]] = [
    # The attack that was found, and its relatives below torch.
    ("model", named(ENCODER, times=EVIL_IMPORT)),
    ("model", EVIL_IMPORT),
    ("model", named("torch.nn.attention._fa3.register_flash_attention_fa3", module_path="evil")),
    ("model", named("torch.nn.attention.register_flash_attention_impl", impl="x", register_fn="evil")),
    ("model", named("torch.nn.attention.activate_flash_attention_impl", impl="FA4")),
    ("model", named("torch.nn.utils.convert_parameters.torch.load", f="evil.pt", weights_only=False)),
    ("model", named("torch.nn.utils.parametrize.register_parametrization")),
    ("model", named("torch.nn.Module.load_state_dict")),
    ("model", named("torch.nn.Linear", in_features=1, out_features=1)),
    ("model", named("torch.nn.init.constant_")),
    ("model", named("torch.nn.modules.module.register_module_forward_hook", hook=EVIL_IMPORT)),
    ("model", named("torch.hub.load", repo_or_dir=".")),
    ("model", named("torch.optim.AdamW", params=[])),
    # Modules of the current folder and of Python.
    ("model", named("evil.Model")),
    ("model", named("ehr_embed.models.evil.Model")),
    ("model", named("os.system", command="touch pwned")),
    ("model", named("builtins.exec")),
    ("model", named("importlib.import_module", name="evil")),
    ("model", named("hydra.utils.instantiate")),
    # Through modules and attributes of an allowed package.
    ("model", named("ehr_embed.models.text_encoder.logging.os.system", command="touch pwned")),
    ("model", named("ehr_embed.models.protocol.instantiate", config=EVIL_IMPORT)),
    ("model", named("ehr_embed.models.encoder.nn.Linear", in_features=1, out_features=1)),
    ("model", named("ehr_embed.models.encoder.__builtins__")),
    ("model", named(f"{ENCODER}.__init__.__globals__")),
    ("model", named(f"{ENCODER}.load_state_dict")),
    ("model", named(f"{ENCODER}.__class__")),
    ("model", named("ehr_embed.models.encoder.Body")),
    ("model", named("ehr_embed.models.text_encoder.AutoModel.from_pretrained")),
    ("model", named("ehr_embed.models.text_encoder.load_pretrained")),
    ("model", named("ehr_embed.models.text_encoder.with_lora")),
    ("model", named("ehr_embed.models.text_encoder._load", name="evil")),
    ("model", named("ehr_embed.models.groups.Groups")),
    ("model", named("ehr_embed.models.protocol.Model")),
    ("model", named("ehr_embed.tasks.classification.Classification")),
    ("model", named("ehr_embed.exports.vocab_pt.VocabularyExport", dir="pwned")),
    ("model", named("ehr_embed.trackers.jsonl.JsonlTracker", run_dir="pwned")),
    # Targets that are no dotted public names.
    ("model", named(7)),
    ("model", named(None)),
    ("model", named(["os.system"])),
    ("model", named({"_target_": "os.system"})),
    ("model", named("")),
    ("model", named("Encoder")),
    ("model", named(f"{ENCODER}\n")),
    ("model", named(f" {ENCODER}")),
    ("model", named(ENCODER.replace("E", "\N{CYRILLIC CAPITAL LETTER IE}"))),
    ("model", named("ehr_embed.models..encoder.Encoder")),
    ("model", named("ehr_embed.models.encoder\N{FULLWIDTH FULL STOP}Encoder")),
    ("model", named("ehr_embed.models/../../evil.Model")),
    # Hydra's own keys.
    ("model", named(ENCODER, _args_=[1])),
    ("model", named(ENCODER, _partial_=True)),
    ("model", named(ENCODER, _recursive_=False)),
    ("model", named(ENCODER, _convert_="object")),
    ("model", named(ENCODER, times=[{"_args_": ["evil"]}])),
    # Interpolations, also those that only a second look would resolve.
    ("model", named("${oc.env:HOME}")),
    ("model", named(ENCODER, pooling="${oc.create:{_target_: os.system}}")),
    ("model", named(ENCODER, pooling="\\${oc.env:HOME}")),
    ("embedder", named(HASHING, embedding_dim="${oc.env:HOME}")),
    # A target within a target.
    ("model", named(ENCODER, times=[[{"a": EVIL_IMPORT}]])),
    ("model", named(ENCODER, pooling=named(ENCODER))),
    ("task", named("ehr_embed.tasks.classification.Classification", class_weights=EVIL_IMPORT)),
    ("embedder", named(HASHING, embedding_dim=EVIL_IMPORT)),
    ("embedder", named(SHUFFLED, inner=EVIL_IMPORT)),
    ("embedder", named(SHUFFLED, inner=named(ENCODER))),
    ("embedder", named(SHUFFLED, inner=named(SHUFFLED, inner=EVIL_IMPORT))),
    ("embedder", named(SHUFFLED, inner=named(HASHING, _args_=[1]))),
    ("embedder", named(SHUFFLED, inner=[named(HASHING)])),
    ("source", named(MEDS, root=EVIL_IMPORT)),
    # Other groups' members, samplers, pruners, functions, protocols.
    ("task", named("optuna.samplers.TPESampler")),
    ("task", named("optuna.pruners.NopPruner")),
    ("task", named("ehr_embed.tasks.protocol.Task")),
    ("task", named("ehr_embed.tasks.protocol.check_class_weights", weights=[0])),
    ("task", named("ehr_embed.core.files.write_json", path="pwned", value=1)),
    ("embedder", named("ehr_embed.embedders.pooled_encoder.SentenceTransformer", model_name_or_path="evil")),
    ("embedder", named("ehr_embed.embedders.sentence_transformer.load_pretrained")),
    ("embedder", named("ehr_embed.embedders.shuffled_text.deranged", names=[], seed=0)),
    ("embedder", named("ehr_embed.embedders.protocol.Embedder")),
    ("source", named("ehr_embed.sources.demo.demo_source", root="pwned", n_subjects=20, seed=0, overwrite=True)),
    ("source", named("ehr_embed.sources.tokenized.tokenized_source", root="pwned", overwrite=True)),
    ("source", named("ehr_embed.sources.patient_files.patient_files_source", root="pwned", overwrite=True)),
    ("source", named("ehr_embed.sources.cohort.write_demo_cohort", root="pwned", n_subjects=20, seed=0)),
    ("source", named("ehr_embed.sources.meds_writer.MedsWriter", folder="pwned", name="x")),
    ("source", named("ehr_embed.sources.imported.import_once")),
    ("source", named("ehr_embed.sources.hidden_codes.HiddenCodes", inner=named(MEDS, root="."), share=0.5)),
    ("source", named("ehr_embed.sources.demo.MedsSource", root=".")),
    # No group at all, and a class of another kind than plain values.
    ("model", None),
    ("model", "ehr_embed.models.encoder.Encoder"),
    ("model", [named(ENCODER)]),
    ("model", named(ENCODER, times=torch.zeros(1))),
]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Iterator[Path]:
    """A current folder that Python imports from, with a module that tells when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("evil.py", "runs/foreign/evil.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(EVIL)
    yield tmp_path
    for name in [name for name in sys.modules if name.rpartition(".")[2] == "evil"]:
        del sys.modules[name]


def ran(folder: Path) -> bool:
    return (folder / "pwned").exists() or any(name.rpartition(".")[2] == "evil" for name in sys.modules)


@pytest.mark.parametrize(("group", "node"), ATTACKS, ids=lambda value: str(value)[:90])
def test_a_stored_configuration_runs_nothing_else(here, group, node):
    config = {"data": {"source": node}} if group == "source" else {group: node}
    config["trusted_packages"] = ["evil", "os", "torch"]
    before = copy.deepcopy(node) if not isinstance(node, dict) else dict(node)
    with pytest.raises(UserError):
        instantiate(check_stored(config, group))
    assert not ran(here)
    assert node is None or str(node) == str(before)


@pytest.mark.parametrize(
    "node",
    [
        EVIL_IMPORT,
        named("torch.nn.attention._fa3.register_flash_attention_fa3", module_path="evil"),
        named("torch.nn.Module.load_state_dict"),
        named("torch.nn.attention.sdpa_kernel", backends=[]),
        named("torch.nn.init.constant_"),
        named("torch.optim.swa_utils.get_ema_avg_fn"),
        named("torch.optim.adamw.torch.load", f="evil.pt"),
        named("optuna.samplers._tpe.sampler.TPESampler"),
        named("optuna.samplers.TPESampler", constraints_func=EVIL_IMPORT),
        named("optuna.samplers.TPESampler.hyperopt_parameters"),
        named("optuna.pruners.logging.os.system"),
        named("evil.Model"),
        named("ehr_embed.evil.Model"),
        named("ehr_embed.config.instantiate.hydra.utils.instantiate"),
        named("ehr_embed.core.files.shutil.rmtree", path="."),
        named("ehr_embed.experiment.provenance.metadata.sys.exit"),
        named(ENCODER, times=[EVIL_IMPORT]),
        named("ehr_embed.models.encoder._hidden"),
        named(3),
    ],
    ids=str,
)
def test_ones_own_configuration_names_classes_too(here, node):
    with pytest.raises(UserError):
        instantiate(OmegaConf.create(node))
    assert not ran(here)


def test_members_are_built():
    sizes = {"embedding_dim": 8, "num_classes": 2}
    node = OmegaConf.to_container(composed("model=encoder_small").model, resolve=True)
    model = check_stored({"model": node}, "model")
    assert type(instantiate(model, **sizes)).__name__ == "Encoder"
    inner = {"inner": named(HASHING, embedding_dim=5, trainable="frozen"), "trainable": "frozen"}
    assert instantiate_embedder(check_stored({"embedder": named(SHUFFLED, **inner)}, "embedder")).embedding_dim == 5
    assert instantiate(OmegaConf.create(named("optuna.samplers.RandomSampler", seed=1)))
    assert instantiate(OmegaConf.create(named("torch.nn.Linear", in_features=1, out_features=2))).out_features == 2


@pytest.mark.parametrize("option", [path.stem for path in sorted(Path("conf/model").glob("*.yaml"))])
def test_every_shipped_model_may_be_stored(option):
    node = OmegaConf.to_container(composed(f"model={option}").model, resolve=True)
    assert check_stored({"model": node}, "model")["_target_"] == node["_target_"]


@pytest.mark.parametrize("group", ["task", "embedder"])
def test_every_shipped_member_may_be_stored(group):
    for path in sorted(Path(f"conf/{group}").glob("*.yaml")):
        node = OmegaConf.to_container(composed(f"{group}={path.stem}", "data=meds", "data.root=x")[group], resolve=True)
        assert check_stored({group: node}, group)["_target_"] == node["_target_"]


def test_trusted_packages_of_the_user_work_for_classes_and_what_is_in_them(here):
    (here / "mine.py").write_text(
        "from ehr_embed.core.files import write_json\nfrom torch import nn\n"
        "class Part(nn.Module):\n    pass\n"
        "class Mine(nn.Module):\n    def __init__(self, *, part, embedding_dim=1):\n        super().__init__(); self.part = part\n"
    )
    config = {"model": named("mine.Mine", part=named("mine.Part"))}
    assert type(instantiate(check_stored(config, "model", ["mine"]), trusted=["mine"]).part).__name__ == "Part"
    with pytest.raises(UserError, match=r"trusted_packages=\[mine\]"):
        check_stored(config, "model")
    for other in (named("mine.write_json", path="pwned", value=1), named("mine.Mine", part=EVIL_IMPORT)):
        with pytest.raises(UserError, match=r"_target_=\S+ .*\bclass\b"):
            check_stored({"model": other}, "model", ["mine"])
    assert not ran(here)


def test_a_stored_source_that_writes_is_read_at_its_root_or_asked_for(trained, ward, tmp_path):
    run = open_run(trained)
    labels = ward / "labels" / "outcome" / "labels.parquet"
    (before,) = ward.glob("labels/**/*.parquet") if not labels.exists() else (labels,)
    content = before.read_bytes()
    demo = named("ehr_embed.sources.demo.demo_source", root=str(ward), n_subjects=200, seed=0, overwrite=True)
    object.__setattr__(run, "config", {"data": {"source": demo}})
    assert trained_on(run).labels_dir == ward / "labels"
    assert before.read_bytes() == content
    object.__setattr__(run, "config", {"data": {"source": demo | {"root": str(tmp_path / "none")}}})
    with pytest.raises(UserError, match=r"data\.root=DIR"):
        trained_on(run)
    assert not (tmp_path / "none").exists()


def foreign(trained: Path, folder: Path, **changes: Any) -> Path:
    """The run, with changed keys of its model, as `runs/foreign` of a folder."""
    config = torch.load(trained / "best_checkpoint.pt", weights_only=True)["config"]
    (folder / "runs" / "foreign").rmdir() if (folder / "runs" / "foreign").is_dir() else None
    return stored(trained, folder / "runs", model=config["model"] | changes)


@pytest.mark.parametrize("command", ["predict", "explain", "generate", "init_from"])
def test_a_foreign_run_folder_runs_no_code_of_its_own(trained, ward, tmp_path, inside, command):
    (tmp_path / "runs").mkdir()
    folder = foreign(trained, tmp_path, times=named(FA4, module_path="runs.run.evil"))
    (folder / "evil.py").write_text(EVIL)
    arguments = {
        "predict": ["-m", "ehr_embed.predict", "run=runs/run", f"data.root={ward}", "output=out.parquet"],
        "explain": ["-m", "ehr_embed.explain", "run=runs/run", "subject=1"],
        "generate": ["-m", "ehr_embed.generate", "run=runs/run"],
        "init_from": ["train.py", "data=meds", f"data.root={ward}", *SMALL, "init_from=runs/run", "run_dir=runs/new"],
    }[command]
    # A run that starts from a checkpoint reads its weights, and builds nothing that it names.
    output = inside(*arguments, cwd=tmp_path, code=0 if command == "init_from" else 2)
    assert "Traceback" not in output
    assert not (tmp_path / "pwned").exists()
    if command != "init_from":
        assert "_target_=torch.nn.attention._fa4" in output
        with pytest.raises(UserError, match=r"_target_=\S+ .*\bclass\b"):
            ehr_embed.load(folder)
