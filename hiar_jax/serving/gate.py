"""Who may talk to the server: names of hosts, origins of pages, a token.

A page of another site that is open in the same browser can reach a server on
this machine. It cannot choose its Origin, and a name of its own that points
here (DNS rebinding) is no Host of ours.
"""

import dataclasses
import hmac
import urllib.parse

from starlette.datastructures import Headers, QueryParams
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from hiar_jax.serving import protocol

_LOCAL = ('localhost', '127.0.0.1', '::1')
_NAMELESS = ('0.0.0.0', '::', '')
# The page itself has no secrets, and says how to give the token; a load
# balancer asks for health without one.
_OPEN = ('/', '/health', '/static/')


def is_local(host: str) -> bool:
  """Whether only programs of this machine reach a server bound to a host."""
  return host in _LOCAL


@dataclasses.dataclass(frozen=True)
class Rules:
  """What a request is held against.

  Attributes:
    host: that the server is bound to.
    token: that a request must show; None: none.
    origins: of pages on other hosts that may use the server, such as
      'https://example.org'.
  """

  host: str
  token: str | None = None
  origins: tuple[str, ...] = ()

  def check(self, scope: Scope) -> None:
    """Raises protocol.Refused unless the request may go on."""
    headers = Headers(scope=scope)
    host = headers.get('host', '')
    origin = headers.get('origin')
    name = urllib.parse.urlsplit(f'//{host}').hostname or ''
    if self.host not in _NAMELESS and not self._is_ours(name):
      raise protocol.Refused('host', f'this server is no {name[:60]!r}', 421)
    if origin is not None and origin not in self.origins:
      there = urllib.parse.urlsplit(origin)
      if there.netloc != host or there.scheme not in ('http', 'https'):
        raise protocol.Refused(
          'origin', f'pages of {origin[:60]!r} may not use this server', 403
        )
    path = scope['path']
    if self.token is None or path in _OPEN or path.startswith(_OPEN[-1]):
      return
    kind, _, given = headers.get('authorization', '').partition(' ')
    if kind.lower() != 'bearer':
      given = QueryParams(scope['query_string']).get('token', '')
    if not hmac.compare_digest(given.encode(), self.token.encode()):
      raise protocol.Refused('token', 'the token is missing or wrong', 401)

  def _is_ours(self, name: str) -> bool:
    if is_local(self.host):
      return name in _LOCAL
    allowed = [urllib.parse.urlsplit(o).hostname for o in self.origins]
    return name == self.host or name in allowed


class Gate:
  """Middleware that lets through what the rules allow."""

  def __init__(self, app: ASGIApp, rules: Rules):
    self._app, self._rules = app, rules

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """One request of HTTP or of a WebSocket."""
    if scope['type'] not in ('http', 'websocket'):
      await self._app(scope, receive, send)
      return
    try:
      self._rules.check(scope)
    except (protocol.Refused, ValueError) as error:
      if not isinstance(error, protocol.Refused):  # A Host that is none.
        error = protocol.Refused('host', 'the Host is not readable')
      response = JSONResponse(error.as_json(), error.status)
      if scope['type'] == 'websocket':
        await WebSocket(scope, receive, send).send_denial_response(response)
      else:
        await response(scope, receive, send)
      return
    await self._app(scope, receive, send)
