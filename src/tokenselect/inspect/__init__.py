"""What was read for an answer, for people and for programs: a page, a text, JSON."""

from tokenselect.inspect.page import write_page
from tokenselect.inspect.report import as_dict, as_text

__all__ = ["as_dict", "as_text", "write_page"]
