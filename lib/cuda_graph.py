"""A training step as one CUDA graph."""

from collections.abc import Callable

import torch
import torch.nn as nn

from lib.cli import Failure, first_line, warn
from lib.device import is_out_of_memory


class GraphedStep:
    """A training step whose thousands of kernels are replayed as one CUDA graph, at the cost of one launch.

    A graph has fixed shapes and a fixed learning rate: a batch of another size runs eagerly, and the step is captured
    again for each new rate.
    """

    def __init__(self, eager: Callable[..., torch.Tensor], net: nn.Module, optimizer: torch.optim.Optimizer,
                 batch_size: int):
        """``eager(images, labels, images_per_rank)`` trains ``net`` with ``optimizer``, see train.train_step."""
        self.eager, self.net, self.optimizer, self.batch_size = eager, net, optimizer, batch_size
        self.rate: float | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream: torch.cuda.Stream | None = None
        self.can_capture = True

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, images_per_rank: float) -> torch.Tensor:
        is_full = len(images) == self.batch_size
        if is_full and self.can_capture and self.rate != self.optimizer.param_groups[0]["lr"]:
            self.prepare(images, labels)
        if not is_full or not self.can_capture:
            return self.eager(images, labels, images_per_rank)
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.result.clone()

    def prepare(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Captures the step with the present learning rate. If the warm-up fails, steps run eagerly from then on.

        Raises:
            Failure: if the capture itself fails, which cannot be undone.
        """
        self.images, self.labels, self.graph = images.clone(), labels.clone(), None
        self.rate = self.optimizer.param_groups[0]["lr"]
        problem = ""
        try:
            self.warm_up()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            problem = first_line(error)
        if problem:  # outside the except clause, which would keep the failed step's tensors alive
            self.can_capture = False
            warn(f"no CUDA graph, each operation is launched by itself: {problem}")
            return
        try:
            self.graph = self.capture()
        except RuntimeError as error:
            # leaving a failed capture raises a second error: the first in the chain is the cause, or a signal
            while isinstance(error.__context__, (RuntimeError, KeyboardInterrupt)):
                error = error.__context__
            if isinstance(error, KeyboardInterrupt) or is_out_of_memory(error):
                raise error from None
            raise Failure(f"the training step cannot be captured as a CUDA graph ({first_line(error)}); start again "
                          "with --no-graph") from error

    def step(self) -> None:
        self.result = self.eager(self.images, self.labels, self.batch_size)  # the one rank has the whole batch

    def state(self) -> list[torch.Tensor]:
        """All tensors that a step changes."""
        moments = [v for state in self.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
        return [*self.net.parameters(), *self.net.buffers(), *moments]

    def warm_up(self) -> None:
        """Runs three steps, in which libraries choose kernels and the optimizer makes its state. Then restores all
        tensors. New state of the optimizer becomes zero, from which SGD, Adam and RMSprop start."""
        before = {tensor: tensor.detach().clone() for tensor in self.state()}
        try:
            with torch.random.fork_rng([self.images.device] if self.images.is_cuda else []):
                for _ in range(3):
                    self.on_side_stream()
        finally:
            with torch.no_grad():
                for tensor in self.state():
                    if tensor in before:
                        tensor.copy_(before[tensor])
                    else:
                        tensor.zero_()

    def on_side_stream(self) -> None:
        self.stream = self.stream or torch.cuda.Stream()  # always the same one: memory is cached by stream
        self.stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self.stream):
                self.step()
        finally:  # later work waits for the step, even for a failed one
            torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self) -> torch.cuda.CUDAGraph:
        """Records a step, without running it."""
        self.optimizer.zero_grad(set_to_none=True)  # then the capture allocates the gradients in the graph's own memory
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self.step()
        return graph
