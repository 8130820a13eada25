"""What every opened bundle can do, whatever it is for: open its graphs, close them, and be a context."""

from __future__ import annotations

from runtime.closing import Closing
from runtime.graphs import Graphs
from runtime.request import RequestBuilder


class Opened(Closing):
    """A bundle that is open until `close`, or the end of a ``with`` block.

    Attributes:
        graphs: the bundle's graphs, its manifest and its configuration.
        requests: the bundle's tokenizer, chat template and image processor.
    """

    graphs: Graphs
    requests: RequestBuilder

    def open(self) -> None:
        """Loads all graphs now. Raises ResourceError, BundleError or EnvironmentFault."""
        self.graphs.open()

    def close(self) -> None:
        """Frees the graphs, which are opened again when needed, and ends the process that renders templates."""
        self.graphs.close()
        self.requests.close()

    @property
    def ep(self) -> str:
        """Short name of the execution provider."""
        return self.graphs.ep
