"""Who may do what: bearer tokens and client certificates, and refusals per resource as with RBAC."""

from collections.abc import Mapping

from msgspec import Struct

from nfqproxy.testing.status import forbidden, unauthorized

__all__ = ["Access", "Attributes"]

ANY = "*"


class Attributes(Struct, frozen=True, kw_only=True):
    """What an authorizer looks at."""

    verb: str
    """get, list, watch, create, update, patch or delete."""
    group: str
    plural: str
    """With the subresource, if any: ``services/status``."""
    namespace: str = ""
    name: str = ""


class Access:
    """Known users and what is denied to them; may be changed while the server runs."""

    def __init__(self, tokens: Mapping[str, str] | None = None) -> None:
        """``tokens``: user by bearer token. Without any, everybody is let in as system:anonymous."""
        self.tokens = dict(tokens or {})
        """User by token; removing one revokes it for the next request."""
        self._denied: set[tuple[str, str, str]] = set()

    def deny(self, *, verb: str = ANY, plural: str = ANY, user: str = ANY) -> None:
        """Refuse with 403 from the next request on; open watches go on, as with RBAC."""
        self._denied.add((user, verb, plural))

    def allow(self, *, verb: str = ANY, plural: str = ANY, user: str = ANY) -> None:
        """Take a :meth:`deny` of the same words back."""
        self._denied.discard((user, verb, plural))

    def user(self, authorization: str, certificate_name: str) -> str:
        """Who asks, by the header Authorization or the common name of a client certificate; 401."""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() == "bearer" and (user := self.tokens.get(token.strip())):
            return user
        if certificate_name:
            return certificate_name
        if self.tokens:
            raise unauthorized()
        return "system:anonymous"

    def check(self, user: str, wanted: Attributes) -> None:
        """Raise ApiError (403) if it is denied."""
        for names in self._denied:
            asked = (user, wanted.verb, wanted.plural)
            if all(name in (ANY, word) for name, word in zip(names, asked, strict=True)):
                raise forbidden(user, *asked[1:], wanted.group, wanted.namespace, wanted.name)
