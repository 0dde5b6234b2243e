"""A page of the browser, and all that it complained of or asked the network for."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Tab:
    """A page of the browser, and all that it complained of or asked the network for."""

    def __init__(self, page: Any) -> None:
        self.page, self.complaints, self.requests = page, [], []
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: self.requests.append(request.url))

    def open(self, file: Path, state: str = "") -> Any:
        self.page.goto(f"{file.as_uri()}{state}")
        self.page.wait_for_selector("body[data-ready]")
        return self.page
