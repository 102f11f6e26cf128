"""Samples that a profile is measured on: tasks' items with the data's answers or the model's own."""

from moa_search.calibration.calibrate import Answers, Calibration, Chat, calibrate

__all__ = ["Answers", "Calibration", "Chat", "calibrate"]
