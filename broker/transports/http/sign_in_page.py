"""The sign-in form for browsers, which needs no script."""

from html import escape

POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""It runs nothing, loads only the page's own style, and stands in no frame."""

REFERRER_POLICY = "same-origin"
"""Under `no-referrer` browsers send `Origin: null` with a form (Fetch standard, section 3.1), which is refused."""

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Sign in · Request broker</title>
<link rel="icon" href="static/icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="static/page.css">
</head>
<body>
<header><h1>Request broker</h1></header>
<main>
  <form id="sign-in" class="card" method="post" action="login">
    <h2>Sign in</h2>
    <input type="hidden" name="_xsrf" value="{xsrf}">
    <label for="name">Name</label>
    <input id="name" name="name" autocomplete="username" autocapitalize="none" required spellcheck="false" autofocus>
    <label for="password">Password</label>
    <input id="password" name="password" type="password" autocomplete="current-password" required>
    <p class="error" role="alert">{error}</p>
    <button type="submit">Sign in</button>
    <p class="hint">With a token instead of a name, sign in <a href="./">on the page</a>.</p>
  </form>
</main>
</body>
</html>
"""


def sign_in_page(xsrf: str, error: str = "") -> bytes:
    """The form with its `_xsrf`, and why it did not work the last time. Addresses are relative: any prefix will do."""
    return _PAGE.format(xsrf=escape(xsrf), error=escape(error)).encode()
