"""Learning rates: schedules as pure functions of the epoch and the step."""
