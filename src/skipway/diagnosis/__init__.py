"""Diagnosis: will a network train, where is the fault, why, and what to do; which of several to train."""

from skipway.diagnosis.comparison import Comparison
from skipway.diagnosis.diagnosis import Diagnosis, Treatment
from skipway.diagnosis.findings import Finding
from skipway.diagnosis.measurement import ConnectionSignal, LayerSignal, Measurement
from skipway.diagnosis.offers import Offer
from skipway.diagnosis.outlook import NextLook
from skipway.diagnosis.question import diagnose
from skipway.diagnosis.settings import Settings

__all__ = [
    "Comparison",
    "ConnectionSignal",
    "Diagnosis",
    "Finding",
    "LayerSignal",
    "Measurement",
    "NextLook",
    "Offer",
    "Settings",
    "Treatment",
    "diagnose",
]
