"""Text-embedded transformers for electronic-health-record event sequences."""

__version__ = "0.1.0"
