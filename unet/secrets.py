"""Takes secrets out of text. Whatever is shown, logged, sent to MLflow or saved goes through here.

A secret in a URI stands before an @ (`https://TOKEN@host`, `s3://KEY:SECRET@bucket`) or in its query
(`?secret_key=…`). Nothing else is looked for: settings have no other place for one. What stands alone before the @ of
`abfs://ACCOUNT@CONTAINER` and `gs://anonymous@BUCKET` is none, and without it they name another place.
"""

import re
from typing import Any

MASK = "***"

# Up to the last @ before the first slash: # and ? end a host, but stand in passwords that were not percent-encoded.
# What comes before a slash shows whether it is part of a password or follows a port.
_NO_SECRET = r"(?:(?<=\babfs://)|(?<=\babfss://))[\w.$-]+@[^@/\s]+(?:[/\s]|$)|(?<=\bgs://)anonymous@[\w.-]+(?:[/?\s]|$)"
_USERINFO = re.compile(rf"(://)(?!{_NO_SECRET})(?:[^/\s]+|(?!\[)[^/\s:]*:(?!\d{{0,5}}(?:/|$))\S+)@")
_NAMES = "key|secret|token|passw|pwd|signature|credential"
_QUERY = re.compile(rf"([?&;#](?!orderByKey=)(?:[^=&;#?\s]*(?:{_NAMES})[^=&;#?\s]*|sig)=)[^&\s'\"]+", re.IGNORECASE)
_AZURE_TOKEN = re.compile(r"(s[veprst]|srt|spr|sip|sk\w+)=")


def without_secrets(text: str) -> str:
    """A URI, or any text with URIs in it, as it may be shown and saved."""
    return _QUERY.sub(rf"\1{MASK}", _USERINFO.sub(rf"\1{MASK}@", text))


def without_credentials(uri: str) -> str:
    """A URI that reaches the same place by the credentials of the environment, to be typed again."""
    base, mark, query = uri.partition("?")
    parts = [part for part in query.split("&") if part and without_secrets(f"?{part}") == f"?{part}"]
    if "sig=" in query:  # a token for Azure's stores is several parameters, which without the signature are wrong
        parts = [part for part in parts if not _AZURE_TOKEN.match(part)]
    base = re.sub(rf"://{re.escape(MASK)}@", "://", without_secrets(base))
    return base + (mark + "&".join(parts) if parts else "")


def without_passwords(values: dict[str, Any]) -> dict[str, Any]:
    """Settings as they may be shown and saved."""
    return {name: without_secrets(v) if isinstance(v, str) else v for name, v in values.items()}


def lost(saved: Any) -> bool:
    """Whether a saved setting had a secret, so that it has to be given again."""
    return isinstance(saved, str) and (f"://{MASK}@" in saved or f"={MASK}" in saved)
