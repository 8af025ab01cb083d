"""A task whose grading misbehaves when the response says so. Worker processes import this file."""

import time

from tw_jax.tasks.task import Task


class Words(Task):
    """The correct response contains the word of the problem. It is not a config class."""

    def __init__(self, workers=2, item_seconds=20.0):
        """Sets the limits of the pool."""
        self.workers, self.item_seconds = workers, item_seconds

    def grade(self, problem, text):
        """Grades, or does as the response says."""
        if text == "hang":
            time.sleep(60)
        if text == "raise":
            raise KeyError(text)
        if text == "None":
            return None
        return "correct" if problem.extra["word"] in text else "wrong"
