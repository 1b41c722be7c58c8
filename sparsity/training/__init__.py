"""Sparse training: schedules, masks, and the controller that updates them after every step."""
