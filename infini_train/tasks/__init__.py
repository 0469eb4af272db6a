"""Retrieval tasks: a fact (needle) in a long text, and a question about it at the end.

This package only generates samples and does not depend on a model.
"""

from infini_train.tasks.draws import Purpose
from infini_train.tasks.filler import RepeatedFiller, TextFiller
from infini_train.tasks.placement import at_depth, training_placement
from infini_train.tasks.sample import Sample
from infini_train.tasks.stories import STORIES
from infini_train.tasks.task import Task

__all__ = ["STORIES", "Purpose", "RepeatedFiller", "Sample", "Task", "TextFiller", "at_depth", "training_placement"]
