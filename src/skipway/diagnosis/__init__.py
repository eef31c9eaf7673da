"""Diagnosis: one batch before training says whether it will train, what is at fault, why, and what to do."""

from skipway.diagnosis.diagnosis import Diagnosis, Treatment, diagnose
from skipway.diagnosis.findings import Finding
from skipway.diagnosis.measurement import ConnectionSignal, LayerSignal, Measurement
from skipway.diagnosis.settings import Settings

__all__ = [
    "ConnectionSignal",
    "Diagnosis",
    "Finding",
    "LayerSignal",
    "Measurement",
    "Settings",
    "Treatment",
    "diagnose",
]
