"""One file over HTTP: resumed where it broke off, retried, and never waited for without end."""

from __future__ import annotations

import email.utils
import http.client
import json
import logging
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Callable, Optional

from fastirt.errors import UserError

log = logging.getLogger("fastirt")

CHUNK = 2**18  # bytes
AGENT = "fastirt"
GIVE_UP = {400, 401, 403, 404, 405, 410, 451}  # asking again does not help


@dataclass(frozen=True)
class Patience:
    """How long to wait for a server.

    timeout: seconds without a connection or a byte, and the time in which `slowest` bytes a second
        must come on average.
    retries: failures in a row, without bytes at that rate, before the next address is tried.
    pause: seconds before the first retry, doubled up to `longest_pause`.
    """

    timeout: float = 30.0
    retries: int = 6
    pause: float = 1.0
    longest_pause: float = 60.0
    slowest: float = 1000.0


class Refused(Exception):
    """An address has another file, or none: asking it again does not help."""


class BrokenOff(Exception):
    """The transfer failed on the way; asking again may help."""


def transfer(url: str, part: Path, size: int, patience: Patience, advance: Callable[[int], None]) -> None:
    """Fill `part` with the `size` bytes at `url`, after those that are there from the same file.

    advance: called with the number of new bytes, negative where bytes are given up.

    Raises:
        Refused: the address has no file, or one of another size.
        BrokenOff: more than `patience.retries` failures in a row.
    """
    failures, pause, last = 0, 0.0, ""
    while (before := part.stat().st_size if part.exists() else 0) != size:
        since = time.monotonic()
        try:
            _once(url, part, size, patience, advance)
        except BrokenOff as error:
            last = str(error)
        after = part.stat().st_size if part.exists() else 0
        if after == size:
            return
        # Few bytes are none: a server may send some of the file, stall, and do so for ever.
        enough = patience.slowest * (time.monotonic() - since + pause)
        failures = 1 if after - before > enough else failures + 1
        if failures > patience.retries:
            raise BrokenOff(last)
        pause = min(patience.longest_pause, patience.pause * 2 ** (failures - 1))
        log.warning("%s: %s after %s of %s bytes: going on in %.1f s", url, last, f"{after:,}", f"{size:,}", pause)
        time.sleep(pause)


def _once(url: str, part: Path, size: int, patience: Patience, advance: Callable[[int], None]) -> None:
    """One request. Raises Refused or BrokenOff."""
    validator = part.with_name(part.name + ".etag")
    have = part.stat().st_size if part.exists() else 0
    if have > size:
        advance(-have)
        part.unlink()
        have = 0
    headers = {"User-Agent": AGENT, "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if tag := _read_tag(validator, url):
            headers["If-Range"] = tag
    try:
        with _opener().open(urllib.request.Request(url, headers=headers), timeout=patience.timeout) as answer:
            start = _start(answer, part, have, size)
            if start < have:
                advance(start - have)
            tag = _tag(answer)
            validator.write_text(json.dumps({"url": url, "tag": tag}), encoding="utf-8")
            with _opened(part) as file:
                file.truncate(start)
                file.seek(start)
                _copy(answer, file, size - start, patience, advance)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:  # the server's file ends before ours: begin again
                part.unlink(missing_ok=True)
                advance(-have)
                raise BrokenOff("the server has no such range") from None
            if error.code in GIVE_UP or 300 <= error.code < 400:
                raise Refused(f"HTTP {error.code} {_one_line(error.reason)}") from None
            raise BrokenOff(f"HTTP {error.code} {_one_line(error.reason)}") from None
    except TimeoutError:
        raise BrokenOff(f"no answer for {patience.timeout:g} s") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise BrokenOff(f"no answer for {patience.timeout:g} s") from None
        raise BrokenOff(_one_line(error.reason)) from None
    except (http.client.HTTPException, OSError) as error:  # those of the disk are UserErrors
        raise BrokenOff(_one_line(error) or type(error).__name__) from None
    except ValueError as error:  # a header or an address that is none
        raise Refused(_one_line(error)) from None


def _opener() -> urllib.request.OpenerDirector:
    """Follows redirections to http and https alone."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _start(answer: http.client.HTTPResponse, part: Path, have: int, size: int) -> int:
    """The position of the answer's first byte.

    Raises Refused for a file of another size, and BrokenOff for other bytes than were asked for.
    """
    length = answer.headers.get("Content-Length", "")
    kind = answer.headers.get_content_type()
    if answer.status == 206:
        place, _, whole = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        first = place.partition("-")[0]
        if whole not in (str(size), "*"):
            raise Refused(f"a file of {whole or '?'} bytes is there instead of {size:,}")
        if first != str(have):
            part.unlink(missing_ok=True)  # ask without a range
            raise BrokenOff(f"bytes {place or '?'} came instead of {have}-{size - 1}")
        return have
    if length.isdigit() and int(length) != size:
        raise Refused(f"{int(length):,} bytes of {kind} are there instead of {size:,}")
    return 0


def _copy(
    answer: http.client.HTTPResponse, file: FileIO, wanted: int, patience: Patience, advance: Callable[[int], None]
) -> None:
    """Write `wanted` bytes. Raises BrokenOff for fewer or a crawl, Refused for more."""
    since, came = time.monotonic(), 0
    while wanted or answer.length is None:
        if not (data := answer.read1(CHUNK)):
            break
        if len(data) > wanted:
            file.truncate(0)
            raise Refused("more bytes come than the file has")
        _write(file, data)
        wanted -= len(data)
        came += len(data)
        advance(len(data))
        if (passed := time.monotonic() - since) > patience.timeout:
            if came < patience.slowest * passed and wanted:
                raise BrokenOff(f"only {came / passed:.0f} bytes a second came")
            since, came = time.monotonic(), 0
    if wanted:
        raise BrokenOff("the connection ended")


def _opened(part: Path) -> FileIO:
    """The part for writing, unbuffered: a killed process loses nothing that came. Raises
    UserError.
    """
    try:
        return FileIO(part, "r+" if part.exists() else "w")
    except OSError as error:
        raise UserError(f"{part}: cannot be written ({error.strerror}): choose another folder") from None


def _write(file: FileIO, data: bytes) -> None:
    left = memoryview(data)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        raise UserError(
            f"{file.name}: cannot be written ({error.strerror}): free space; the next call goes on from here"
        ) from None


def _tag(answer: http.client.HTTPResponse) -> str:
    """What names this version of the file: a strong ETag, or its date; "" for none."""
    tag = answer.headers.get("ETag", "")
    if tag.startswith('"'):
        return tag
    date = answer.headers.get("Last-Modified", "")
    return date if date and email.utils.parsedate(date) else ""


def _read_tag(validator: Path, url: str) -> Optional[str]:
    """The tag of the bytes in the part, if they came from `url`."""
    try:
        noted = json.loads(validator.read_text(encoding="utf-8"))
        return str(noted["tag"]) if noted["url"] == url else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _one_line(reason: object) -> str:
    return " ".join(str(reason).split())[:200]
