"""Trained networks in use: predict, evaluate, optimize, export, publish."""

from skipway.inference.backend_selection import BackendResult
from skipway.inference.backends import BACKENDS, PRECISIONS, Backend, Choice
from skipway.inference.duplicates import find_duplicates, thumbnails
from skipway.inference.evaluation import Evaluation, evaluate, wilson_interval
from skipway.inference.neighbours import find_label_errors, find_outliers, label_votes, nearest_neighbours
from skipway.inference.onnx import export_onnx, export_program
from skipway.inference.optimized_model import OptimizedModel, optimize
from skipway.inference.predict import Prediction, Predictor, from_pretrained

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "Backend",
    "BackendResult",
    "Choice",
    "Evaluation",
    "OptimizedModel",
    "Prediction",
    "Predictor",
    "evaluate",
    "export_onnx",
    "export_program",
    "find_duplicates",
    "find_label_errors",
    "find_outliers",
    "from_pretrained",
    "label_votes",
    "nearest_neighbours",
    "optimize",
    "thumbnails",
    "wilson_interval",
]
