"""A picture at an address: fetched once, of bounded size, within bounded time. Nothing else leaves the machine."""

from __future__ import annotations

import time
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
)

from finedetr._version import __version__
from finedetr.errors import RunError

__all__ = ["fetch", "is_address"]

LIMIT = 64 * 2**20  # bytes; the largest pictures that are sent around are smaller
SILENCE = 20.0  # seconds without a byte
WHOLE = 120.0  # seconds for all of it
PIECE = 2**16


def is_address(text: str) -> bool:
    """Whether this is an http or https address."""
    return text.lower().startswith(("http://", "https://"))


def fetch(address: str) -> bytes:
    """The bytes at an http or https address. Redirections are followed, to no other kind of address.

    Raises:
        RunError: `run.download`, with the reason: no answer, too large, too slow.
    """
    opener = OpenerDirector()  # the usual one would follow a redirection to ftp, and open files
    for handler in (HTTPHandler, HTTPSHandler, HTTPRedirectHandler, HTTPErrorProcessor, HTTPDefaultErrorHandler):
        opener.add_handler(handler())
    opener.add_handler(ProxyHandler())
    started, parts, size = time.monotonic(), [], 0
    try:
        request = Request(address, headers={"User-Agent": f"finedetr/{__version__}", "Accept": "image/*"})
        with opener.open(request, timeout=SILENCE) as answer:
            while piece := answer.read(PIECE):
                parts.append(piece)
                size += len(piece)
                if size > LIMIT:
                    raise failed(address, f"more than {LIMIT >> 20} MiB")
                if time.monotonic() - started > WHOLE:
                    raise failed(address, f"not there after {WHOLE:g} seconds")
            if answer.length:
                raise failed(address, f"{answer.length} bytes of it are missing")
    except HTTPError as error:  # a redirection to another kind of address, too
        error.close()
        raise failed(address, f"the server answers {error.code} {error.reason}") from error
    except (OSError, HTTPException, ValueError) as error:
        raise failed(address, str(getattr(error, "reason", "") or error or type(error).__name__)) from error
    return b"".join(parts)


def failed(address: str, why: str) -> RunError:
    """The error of an address that gives no picture."""
    return RunError(f"{address}: cannot be fetched ({why})", code="download", hint="Download it, and give the file.")
