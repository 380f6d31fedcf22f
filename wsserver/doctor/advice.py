"""Advice for operators: what mends a trouble, for each proxy.

The names are those of the proxies' own documentation.
"""

from collections.abc import Mapping

SERVER = "wsserver"  # the key of advice about the server itself
NAMES = {
    "nginx": "nginx",
    "haproxy": "HAProxy",
    "caddy": "Caddy",
    "cloudflare": "Cloudflare",
    "alb": "AWS ALB",
    "apache": "Apache",
}
"""The proxies that the advice is for."""


Advice = Mapping[str, str]
"""What mends one trouble, by proxy."""

UPGRADE: Advice = {
    "nginx": "`proxy_http_version 1.1;`, `proxy_set_header Upgrade $http_upgrade;` and "
    '`proxy_set_header Connection "upgrade";`',
    "haproxy": "`mode http`; remove `http-request del-header Upgrade` and `del-header Connection`",
    "caddy": "remove `header_up -Upgrade`, `header_up -Connection` and `buffer_responses` from "
    "`reverse_proxy`, and `versions 2` from its `transport`",
    "cloudflare": "Network, WebSockets: on",
    "alb": "a target group of the protocol version HTTP1; HTTP2 and gRPC cannot upgrade",
    "apache": "`ProxyPass / http://HOST:PORT/ upgrade=websocket` (2.4.47 or later)",
}
HTTP2: Advice = {
    "nginx": "`listen 443 ssl;`: clients open WebSockets over HTTP/1.1",
    "haproxy": "`alpn h2,http/1.1` in the `bind` line",
    "apache": "`Protocols h2 http/1.1`",
}
ROUTE: Advice = {
    "nginx": "a `location` with `proxy_pass` that matches this path",
    "haproxy": "`default_backend`, or `use_backend … if { path_beg PATH }` for this path",
    "caddy": "`reverse_proxy` without a path, or with a matcher for this path",
    "cloudflare": "a route to the origin in Workers routes and Page Rules",
    "alb": "a listener rule that forwards this path to the target group",
    "apache": "`ProxyPass` for this path",
}
PREFIX: Advice = {
    "nginx": "`location /PREFIX/ { proxy_pass http://HOST:PORT/; }`, with the slash after PORT",
    "haproxy": r"`http-request replace-path /PREFIX(/.*) \1`",
    "caddy": "`handle_path /PREFIX/* { reverse_proxy HOST:PORT }`",
    "alb": "ALB passes paths on unchanged: use a host name without a prefix",
    "apache": "`ProxyPass /PREFIX/ http://HOST:PORT/`, with both slashes",
}
UPSTREAM: Advice = {
    "nginx": "`proxy_pass` must name the address of the server; error.log has the reason",
    "haproxy": "the `server` line must name the address of the server; its log has the reason",
    "caddy": "`reverse_proxy` must name the address of the server; its log has the reason",
    "cloudflare": "the DNS record and the SSL/TLS mode must fit the origin",
    "alb": "the health check of the target group: path `/healthz`, status 200",
    "apache": "`ProxyPass` must name the address of the server; error.log has the reason",
}
REFUSED: Advice = {
    "nginx": "look for `allow`, `deny`, `auth_basic`, `limit_req` and `return` at this path",
    "haproxy": "look for `http-request deny` and `tarpit`",
    "caddy": "look for `respond`, `basic_auth` and `forward_auth` at this path",
    "cloudflare": "Security, Events: which rule answers; Network, WebSockets: on",
    "alb": "look for fixed responses, `authenticate` actions and AWS WAF",
    "apache": "look for `Require` and `AuthType` at this path",
}
HOST: Advice = {
    "nginx": "`proxy_set_header Host $http_host;` ($host is without the port)",
    "haproxy": "remove `http-request set-header Host`",
    "caddy": "remove `header_up Host …` from `reverse_proxy`",
    "cloudflare": "remove the Host header override from Origin Rules",
    "alb": "the attribute `routing.http.preserve_host_header.enabled`: true",
    "apache": "`ProxyPreserveHost On`",
    SERVER: "or add the host name to the setting `hosts` (WSSERVER_HOSTS), and the address of "
    "the page to `origins` (WSSERVER_ORIGINS)",
}
ORIGIN: Advice = {
    "nginx": "remove `proxy_set_header Origin …`",
    "haproxy": "remove `http-request del-header Origin` and `set-header Origin`",
    "caddy": "remove `header_up Origin …` and `header_up -Origin` from `reverse_proxy`",
    "cloudflare": "remove Origin from Transform Rules",
    "apache": "remove `RequestHeader unset Origin`",
    SERVER: "the setting `origins` (WSSERVER_ORIGINS) must not have `*`",
}
ANY_HOST: Advice = {
    "nginx": "`proxy_set_header Host $http_host;`, and a `default_server` with `return 444;`",
    "haproxy": "remove `http-request set-header Host`",
    "caddy": "a site with the host name instead of `:80` or `:443`, without `header_up Host`",
    SERVER: "the setting `hosts` (WSSERVER_HOSTS) must not have `*`",
}
AUTHORIZATION: Advice = {
    "nginx": "remove `proxy_set_header Authorization …` and `auth_basic`",
    "haproxy": "remove `http-request del-header Authorization` and `http-request auth`",
    "caddy": "remove `header_up -Authorization` and `basic_auth`",
    "cloudflare": "remove Authorization from Transform Rules",
    "apache": "`SetEnvIf Authorization .+ HTTP_AUTHORIZATION=$0`; no `AuthType`",
}
IDLE: Advice = {
    "nginx": "`proxy_read_timeout 120s;` and `proxy_send_timeout 120s;`",
    "haproxy": "`timeout tunnel 1h`",
    "caddy": "remove `stream_timeout` from `reverse_proxy` and `read_timeout` from its `transport`",
    "cloudflare": "cuts after 100 s without data: `ping_interval` must be less",
    "alb": "the attribute `idle_timeout.timeout_seconds`: 120",
    "apache": "`ProxyTimeout 120`",
    SERVER: "the setting `ping_interval` (WSSERVER_PING_INTERVAL) must be less than the time-out "
    "of each proxy",
}
SSE_BUFFERED: Advice = {
    "nginx": "`proxy_buffering off;`; remove `text/event-stream` from `gzip_types`, and "
    "`proxy_ignore_headers X-Accel-Buffering;`",
    "haproxy": "`option http-no-delay`: without it HAProxy collects pieces for 0.2 s; remove "
    "`text/event-stream` from `compression type`",
    "caddy": "`flush_interval -1` in `reverse_proxy`; remove `buffer_responses` and "
    "`response_buffers`",
    "cloudflare": "no caching and no response buffering for this path",
    "alb": "ALB does not buffer; look at the proxies before and after it",
    "apache": "`ProxyPass … flushpackets=on`, `SetEnv no-gzip 1`",
}
BODY: Advice = {
    "nginx": "`client_max_body_size 2m;`",
    "haproxy": "remove `http-request deny if { req.body_size gt … }`",
    "caddy": "`request_body { max_size 2MB }`",
    "cloudflare": "a rule of the WAF limits the body",
    "alb": "the body limit of AWS WAF",
    "apache": "`LimitRequestBody 2097152`",
}
STICKY: Advice = {
    "nginx": "`hash $remote_addr consistent;` in `upstream`",
    "haproxy": "`balance source`, or `cookie` in the backend",
    "caddy": "`lb_policy ip_hash` in `reverse_proxy`",
    "cloudflare": "Load Balancing, Session Affinity: on",
    "alb": "stickiness in the target group",
    "apache": "`stickysession` in `ProxyPass`",
    SERVER: "the servers behind the proxy do not share their replies: give all of them the same "
    "`store` in PostgreSQL and the same `cluster` (Redis)",
}
SCHEME: Advice = {SERVER: "use an address that begins with wss://"}
ANONYMOUS: Advice = {
    SERVER: "make tokens with `wsserver token new NAME --file FILE`, for the setting `token_file`; "
    "or admit everybody with `allow_anonymous`",
}
FULL: Advice = {
    SERVER: "list the proxy in the setting `proxies` (WSSERVER_PROXIES): otherwise all its clients "
    "count as one address; or raise `connections` and `connections_per_address`",
}


def recognize(headers: Mapping[str, str], body: str = "") -> str | None:
    """Return the key of the proxy that made or passed a response; None for an unknown one.

    Args:
        headers: headers of the response, names in lower case.
        body: the begin of the body.
    """
    server, via = headers.get("server", "").lower(), headers.get("via", "").lower()
    if "cf-ray" in headers or "cloudflare" in server:
        return "cloudflare"
    for key, sign in (
        ("nginx", "nginx"),
        ("nginx", "openresty"),
        ("caddy", "caddy"),
        ("alb", "awselb"),
        ("apache", "apache"),
        ("haproxy", "haproxy"),
    ):
        if sign in server or sign in via:
            return key
    # HAProxy adds no header; its own responses have this body.
    return "haproxy" if body.startswith("<html><body><h1>") else None


def advise(trouble: Advice, proxy: str | None) -> tuple[str, ...]:
    """Return the lines of advice: those for one proxy, or for all where the proxy is unknown."""
    keys = list(NAMES) if proxy is None or proxy not in trouble else [proxy]
    about = [f"{NAMES[key]}: {trouble[key]}" for key in keys if key in trouble]
    return (*about, *([trouble[SERVER]] if SERVER in trouble else []))
