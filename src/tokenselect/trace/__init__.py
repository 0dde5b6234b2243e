"""What was read for an answer: recorded while it is written, kept in a small file, shown by `tokenselect.inspect`."""

from tokenselect.trace.files import TraceError, load_trace, save_trace
from tokenselect.trace.passages import Passage, find_passages
from tokenselect.trace.record import Trace

__all__ = ["Passage", "Trace", "TraceError", "find_passages", "load_trace", "save_trace"]
