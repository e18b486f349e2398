"""An object store behind Arrow's file system, with patience: what may pass is tried again, what cannot pass is said.

Every call to a store goes through `Store`. A server that is away, overloaded or silent is asked again, after pauses
that double and are drawn at random, for as long as the `patience` around the call lasts; a wrong key or a missing
bucket is an error at once. Both are sentences (`StorageFailed`); that there is no such file stays FileNotFoundError.

Why: docs/decisions.md#an-object-store-is-waited-for
"""

import contextlib
import io
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from unet.errors import StorageAway, StorageFailed, first_line
from unet.secrets import without_secrets

Result = TypeVar("Result")

PATIENCE_SECONDS = 300.0
"""How long a store is waited for."""
SILENT_SECONDS, CONNECT_SECONDS = 15.0, 5.0
"""How long a store may send nothing in an answer, and take to accept a connection. The AWS SDK's are 3 and 1."""
ONCE = timedelta(seconds=0.1)
"""A time for attempts that only the first of Google's client falls into: its first pause is longer."""
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0
"""Seconds between attempts, at most: the first, and all after a few doublings."""
TOLD_AFTER, TOLD_EVERY = 3.0, 30.0
"""Seconds after which somebody is told that a store is waited for, first and then again."""
CHECKSUMS = "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"

KEYS = "correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
GOOGLE_KEYS = "correct GOOGLE_APPLICATION_CREDENTIALS"
AZURE_KEY, AZURE_TOKEN = "AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN"
AZURE_KEYS = f"correct {AZURE_KEY} or {AZURE_TOKEN}"
NO_BUCKET = "there is no such bucket", "create it, or correct its name"
LASTING = (
    ("NO_SUCH_BUCKET|NoSuchBucket|Bucket '.*' not found|ContainerNotFound", *NO_BUCKET),
    ("INVALID_ACCESS_KEY_ID|InvalidAccessKeyId|INVALID_CLIENT_TOKEN", "it does not know the access key", KEYS),
    ("SIGNATURE_DOES_NOT_MATCH|SignatureDoesNotMatch", "the secret key is wrong", KEYS),
    ("EXPIRED_TOKEN|ExpiredToken|TokenRefreshRequired", "the credentials have expired", "get new ones"),
    ("TIME_TOO_SKEWED|TimeTooSkewed", "this machine's clock is wrong", "set it"),
    ("ACCESS_DENIED|AccessDenied|HTTP status 40[13]", "access is denied", f"allow it, or {KEYS}"),
    (
        "MissingContentLength|HTTP status 411",
        "it does not take checksums that follow the content",
        f"unset {CHECKSUMS[0]}, or set it to when_required",
    ),
    (
        r"Status\(UNAUTHENTICATED|OAuth2 access token|[Cc]redentials? file",
        "it does not take the credentials",
        GOOGLE_KEYS,
    ),
    (r"Status\(PERMISSION_DENIED", "access is denied", f"allow it, or {GOOGLE_KEYS}"),
    (r"Azure Error: \[\w*\] 40[13]", "access is denied", f"allow it, or {AZURE_KEYS}"),
    ("AuthenticationException", "there are no credentials for it", f"set {AZURE_KEY} or {AZURE_TOKEN}"),
    ("Base64 encoded", "the key is not one", AZURE_KEYS),
    ("curlCode: (51|58|60|77|83|90)", "its certificate is not trusted", "name its authority in SSL_CERT_FILE"),
    (r"HTTP status 4(?!08|29)\d\d|curlCode: [13],", None, "put that right"),
    (r"retry\.reason=permanent-error", None, "put that right"),
    # 409 is a lease, which the deletion of an object takes for seconds, 412 its loss.
    (r"Azure Error: \[\w*\] 4(?!08|09|12|29)\d\d", None, "put that right"),
)
"""What no waiting cures: by a pattern of Arrow's message the reason (None: the message's own) and the remedy."""


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def _unchecked() -> None:
    pass


@dataclass(frozen=True)
class Patience:
    """How long a store is waited for.

    Attributes:
        seconds: so long; 0 is a single attempt.
        tell: is told that it is waited for, and for how long it was.
        check: asked before each further attempt, which may come minutes later: raises where it must not be made.
    """

    seconds: float = PATIENCE_SECONDS
    tell: Callable[[str], object] = _say
    check: Callable[[], object] = _unchecked


_patience: ContextVar[Patience] = ContextVar("patience", default=Patience())  # noqa: B039  # it is frozen


@contextlib.contextmanager
def patience(
    seconds: float | None = None,
    tell: Callable[[str], object] | None = None,
    check: Callable[[], object] | None = None,
) -> Iterator[None]:
    """How this thread waits for a store in the block, as far as it is given; see `Patience`."""
    changes: dict[str, Any] = {"seconds": seconds, "tell": tell, "check": check}
    changed = replace(_patience.get(), **{name: value for name, value in changes.items() if value is not None})
    token = _patience.set(changed)
    try:
        yield
    finally:
        _patience.reset(token)


def connect(uri: str) -> tuple[pafs.FileSystem, str]:
    """Arrow's file system for a URI, and the path in it. Time limits and attempts are ours.

    Raises:
        pyarrow.ArrowInvalid: it is not the URI of a storage.
        OSError: the storage cannot be found.
        StorageFailed: there is no such bucket, or (`StorageAway`) AWS did not say where it is.
    """
    if uri.startswith("s3://"):  # without a region in it Arrow asks AWS where the bucket is
        fs, path = _patiently(
            "find", without_secrets(uri.partition("?")[0]), "it", lambda: pafs.FileSystem.from_uri(uri)
        )
    else:
        fs, path = pafs.FileSystem.from_uri(uri)
    if isinstance(fs, pafs.S3FileSystem):
        options = _options(fs)
        _leave_checksums_out(options["endpoint_override"])
        for name, limit in (("request_timeout", SILENT_SECONDS), ("connect_timeout", CONNECT_SECONDS)):
            if options[name] < 0:
                options[name] = limit
        # A small object is then a single request; and what fails is tried again here, where it is seen.
        once = pafs.AwsStandardS3RetryStrategy(max_attempts=1)
        fs = pafs.S3FileSystem(**options | {"allow_delayed_open": True, "retry_strategy": once})
    elif isinstance(fs, pafs.GcsFileSystem):
        options = _options(fs)
        if options["retry_time_limit"] is None:
            fs = pafs.GcsFileSystem(**options | {"retry_time_limit": ONCE})
    elif isinstance(fs, pafs.AzureFileSystem):
        fs = _with_key(fs, uri)
    return fs, path


def _with_key(fs: pafs.AzureFileSystem, uri: str) -> pafs.AzureFileSystem:
    """Azure's SDK takes no key of an account from the environment, and Arrow none from a URI."""
    options = _options(fs)
    if options["client_id"] or options["sas_token"] or "credential_kind=" in uri:
        return fs
    if key := os.environ.get(AZURE_KEY):
        return pafs.AzureFileSystem(**options | {"account_key": key})
    if token := os.environ.get(AZURE_TOKEN):  # which Arrow appends to addresses as it is
        return pafs.AzureFileSystem(**options | {"sas_token": f"?{token.removeprefix('?')}"})
    return fs


def _options(fs: pafs.FileSystem) -> dict[str, Any]:
    """What would make the same file system again, which only its pickle says."""
    return fs.__reduce__()[1][0]


def _leave_checksums_out(endpoint: str) -> None:
    """Stores that are not AWS's may refuse what its SDK sends unasked since 2025, as Ceph's gateway does."""
    if endpoint and not re.search(r"\.amazonaws\.com(\.cn)?(:\d+)?/?$", endpoint):
        for name in CHECKSUMS:
            os.environ.setdefault(name, "when_required")


def _patiently(how: str, place: str, server: str, call: Callable[[], Result]) -> Result:
    """What a call gives, again and again until the store answers, or what no waiting cures, or for too long.

    Raises:
        StorageFailed, StorageAway, FileNotFoundError: as `Store` does.
    """
    allowed = _patience.get()
    began = time.monotonic()
    told, pause = began + TOLD_AFTER - TOLD_EVERY, FIRST_PAUSE
    while True:
        try:
            result = call()
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
            # Not all that Google's and Azure's clients raise is an OSError; nor would a fault of ours be one.
            if not isinstance(error, OSError) and not re.match(r"google::cloud|Unknown error", str(error)):
                raise
            now, (reason, remedy) = time.monotonic(), _why(error)
            waited = now - began
            if remedy:
                raise StorageFailed(f"Cannot {how} {place}: {reason}; {remedy}") from error
            if waited >= allowed.seconds:
                raise StorageAway(
                    f"Cannot {how} {place}: {reason}"
                    + (f", for {waited:.0f} s" if waited > 1 else "")
                    + f"; make sure that {server} can be reached"
                ) from error
            if now - told >= TOLD_EVERY:
                told = now
                allowed.tell(f"waiting for {place}, since {waited:.0f} s: {reason}")
            time.sleep(min(random.uniform(pause / 2, pause), allowed.seconds - waited))
            pause = min(2 * pause, LONGEST_PAUSE)
            with contextlib.suppress(StorageAway), patience(0, check=_unchecked):
                allowed.check()
        else:
            if told > began:
                allowed.tell(f"{place} answers again, after {time.monotonic() - began:.0f} s")
            return result


class Store:
    """What a `Folder` of an object store asks of Arrow's file system, by the same names, each call with patience.

    Raises, everywhere:
        StorageFailed: it cannot be done, or (`StorageAway`) the store was away for longer than it is waited for.
        FileNotFoundError: there is no such file.
    """

    def __init__(self, uri: str, fs: pafs.FileSystem | None = None):
        self._uri, self._fs = uri, fs or connect(uri)[0]
        self._scheme = uri.partition("://")[0]
        self._is_gcs = isinstance(self._fs, pafs.GcsFileSystem)
        options = _options(self._fs)
        server = options.get("endpoint_override") or options.get("blob_storage_authority") or "."
        # What begins with a dot is no server: an account's name stands before it.
        self._server = "it" if server.startswith(".") else without_secrets(server)

    def __reduce__(self):
        return Store, (self._uri,)  # the file system's own pickle forgets how often it tries

    def get_file_info(self, what: "str | pafs.FileSelector") -> Any:
        if isinstance(what, str):
            return self._patiently("read", what, lambda: self._fs.get_file_info(what))
        return self._patiently("read", what.base_dir, lambda: self._list(what))

    def _list(self, what: pafs.FileSelector) -> list[pafs.FileInfo]:
        if what.recursive or not self._is_gcs:
            return self._fs.get_file_info(what)
        # Right below, Arrow names only the folders of GCS that have an object of their own, which nobody makes here.
        all_below = pafs.FileSelector(what.base_dir, allow_not_found=what.allow_not_found, recursive=True)
        found = {}
        for info in self._fs.get_file_info(all_below):
            name, below, _ = info.path.removeprefix(f"{what.base_dir}/").partition("/")
            path = f"{what.base_dir}/{name}"
            found[path] = pafs.FileInfo(path, pafs.FileType.Directory) if below else info
        return list(found.values())

    def open_input_file(self, path: str) -> "_Object":
        file = self._patiently("read", path, lambda: self._fs.open_input_file(path))
        return _Object(file, lambda call: self._patiently("read", path, call))

    open_input_stream = open_input_file

    def put(self, path: str, content: "bytes | memoryview") -> None:
        """Write an object, whole."""

        def send() -> None:
            with self._fs.open_output_stream(path) as stream:
                stream.write(content)

        try:
            self._patiently("write", path, send)
        except FileNotFoundError as error:  # GCS does not say what is not there
            reason, remedy = NO_BUCKET
            raise StorageFailed(f"Cannot write {self._place(path)}: {reason}; {remedy}") from error

    def delete_file(self, path: str) -> None:
        self._remove(path, self._fs.delete_file)

    def delete_dir(self, path: str) -> None:
        if self._is_gcs:  # where Arrow's `delete_dir` fails once all is removed, for want of an object of the folder's
            self._remove(path, lambda path: self._fs.delete_dir_contents(path, missing_dir_ok=True))
        else:
            self._remove(path, self._fs.delete_dir)

    def _place(self, path: str) -> str:
        return f"{self._scheme}://{path}"

    def _remove(self, path: str, remove: Callable[[str], None]) -> None:
        tried = False

        def removal() -> None:
            nonlocal tried
            again, tried = tried, True
            try:
                remove(path)
            except FileNotFoundError as error:
                # Else the attempt before succeeded, and only its answer was lost. Google's client sees first whether
                # there is an object, and repeats by itself what removes it.
                if not again and "function=DeleteObject," not in str(error):
                    raise

        self._patiently("remove", path, removal)

    def _patiently(self, how: str, path: str, call: Callable[[], Result]) -> Result:
        return _patiently(how, self._place(path), self._server, call)


class _Object(io.RawIOBase):
    """An object as a file to read, piece by piece; each piece is asked for again until it comes."""

    def __init__(self, file: Any, patiently: Callable[[Callable[[], Any]], Any]):
        self._file, self._patiently = file, patiently
        self._size, self._place = file.size(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._place)
        size = left if size is None or size < 0 else min(size, left)
        if not size:
            return b""
        place = self._place
        data: bytes = self._patiently(lambda: self._whole(size, place))
        self._place += size
        return data

    def _whole(self, size: int, place: int) -> bytes:
        data = self._file.read_at(size, place)
        if len(data) != size:
            raise OSError(f"{len(data)} bytes came, of {size}")
        return data

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _why(error: Exception) -> tuple[str, str | None]:
    """The reason in words, and the remedy where waiting is none."""
    message = without_secrets(first_line(error))
    for pattern, reason, remedy in LASTING:
        if re.search(pattern, message):
            return reason or _words(message), remedy
    if isinstance(error, PermissionError):
        return "access is denied", "allow it, or correct the credentials"
    return _words(message), None


def _words(message: str) -> str:
    """What matters of a message of Arrow about a store; another as it is."""
    if network := re.search(r"curlCode: \d+, ([^;]+)", message):
        return network[1]
    if of_google := re.search(r"Status\(\w+: (?:.* last message of )?(.+?)(?: error_info=|$)", message):
        return re.sub(r".*CURL error \[\d+\]=", "", of_google[1])
    if of_azure := re.search(r"Azure Error: \[\w*\] (?:\d+ )?(.+)", message):
        return of_azure[1].strip(" .")
    found = re.search(r"AWS Error (?:UNKNOWN \((.+?)\)|(\w+)) during \w+ operation: (.*)", message)
    if found is None:
        return message
    said = re.sub(r" ?\(Request ID.*|No response body", "", found[3]).strip(" .")
    return (found[1] or found[2].replace("_", " ").lower()) + (f" ({said})" if said else "")
