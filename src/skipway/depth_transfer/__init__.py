"""Depth transfer: whether the learning rate of a shallow network suits a deep one, measured by short trainings."""

from skipway.depth_transfer.analysis import transfer
from skipway.depth_transfer.coordinates import COORDINATES, Coordinate, CoordinateRow
from skipway.depth_transfer.result import DepthTransfer, SchemeRates
from skipway.depth_transfer.search import BestRate

__all__ = ["COORDINATES", "BestRate", "Coordinate", "CoordinateRow", "DepthTransfer", "SchemeRates", "transfer"]
