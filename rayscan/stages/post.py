"""Where the workers of a training and its driver leave word for each other: an actor of Ray.

In a module of its own, which imports next to nothing: the process of an actor imports the module of its
class, and that of training, with PyTorch and Ray Train, takes seconds of a core.
"""

from __future__ import annotations

from typing import Any

from rayscan.errors import RayscanError


class Post:
    """Between the driver and the workers: messages one way, the wish to stop the other way."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.stopping = self.over = False

    def put(self, message: Any) -> None:
        self.messages.append(message)
        self.over = self.over or isinstance(message, RayscanError)

    def is_over(self) -> bool:
        return self.over

    def take(self) -> list[Any]:
        taken, self.messages = self.messages, []
        return taken

    def stop(self) -> None:
        self.stopping = True

    def is_to_stop(self) -> bool:
        return self.stopping
