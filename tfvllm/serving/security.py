"""Who may ask: a bearer token, or a name and password."""

import base64
import binascii
import hmac


class Authoriser:
    """Checks Authorization headers in constant time.

    Args:
        token: accepted as `Bearer TOKEN`.
        basic_auth: "user:password", accepted as HTTP basic authentication.
    """

    def __init__(self, token: str | None = None, basic_auth: str | None = None):
        self._token = None if token is None else token.encode()
        self._basic = None if basic_auth is None else basic_auth.encode()

    def __call__(self, header: str) -> bool:
        """Whether `header`, the value of an Authorization header, lets its sender in."""
        scheme, _, value = header.strip().partition(" ")
        value = value.strip()
        if scheme.lower() == "bearer" and self._token is not None:
            # HTTP servers hand headers over as latin-1 whatever the client wrote.
            return hmac.compare_digest(value.encode("latin-1", "replace"), self._token)
        if scheme.lower() == "basic" and self._basic is not None:
            try:
                given = base64.b64decode(value, validate=True)
            except (binascii.Error, ValueError):
                return False
            return hmac.compare_digest(given, self._basic)
        return False
