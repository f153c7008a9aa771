"""Gives tokens for a registry as its issuer does: token_server.py DIR PORT [tls]

DIR has the key and the certificate (issuer.key, issuer.crt) that the registry trusts, with `tls` server.key and server.crt
too. Each request is noted in DIR/asked, a line each.
"""

import base64
import http.server
import json
import ssl
import subprocess
import sys
import time
import urllib.parse

dir, port = sys.argv[1], int(sys.argv[2])
PASSWORD = "Basic " + base64.b64encode(b"user:secret").decode()
IDENTITY = "the-identity"


def packed(content):
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def token(service, scope, is_known):
    certificate = subprocess.check_output(["openssl", "x509", "-in", f"{dir}/issuer.crt", "-outform", "DER"])
    header = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(certificate).decode()]}
    access = []
    if is_known and scope:
        kind, rest = scope.split(":", 1)
        name, actions = rest.rsplit(":", 1)
        access = [{"type": kind, "name": name, "actions": actions.split(",")}]
    now = int(time.time())
    claims = {"iss": "issuer", "sub": "user", "aud": service, "access": access, "jti": str(time.time_ns()),
              "nbf": now - 10, "iat": now - 10, "exp": now + 300}
    text = packed(json.dumps(header).encode()) + "." + packed(json.dumps(claims).encode())
    signature = subprocess.run(["openssl", "dgst", "-sha256", "-sign", f"{dir}/issuer.key"], input=text.encode(),
                               stdout=subprocess.PIPE, check=True).stdout
    return text + "." + packed(signature)


class Issuer(http.server.BaseHTTPRequestHandler):
    def answer(self, code, content):
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def note(self, who, scope):
        with open(f"{dir}/asked", "a") as file:
            file.write(f"{self.command} {who} {scope}\n")

    def do_GET(self):
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
        given = self.headers.get("Authorization")
        scope = query.get("scope", "")
        self.note({None: "nobody", PASSWORD: "user"}.get(given, "wrong"), scope)
        if given not in (None, PASSWORD):
            return self.answer(401, {"errors": []})
        self.answer(200, {"token": token(query.get("service", ""), scope, given is not None)})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        form = dict(urllib.parse.parse_qsl(body))
        scope = form.get("scope", "")
        is_known = form.get("grant_type") == "refresh_token" and form.get("refresh_token") == IDENTITY
        self.note("identity" if is_known else "wrong", scope)
        if not is_known:
            return self.answer(401, {"errors": []})
        self.answer(200, {"access_token": token(form.get("service", ""), scope, True)})

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Issuer)
if "tls" in sys.argv:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{dir}/server.crt", f"{dir}/server.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
