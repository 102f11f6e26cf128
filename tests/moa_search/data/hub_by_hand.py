"""A stand-in for the hub on loopback: one data set, as `datasets` asks for it."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading

NAME = "org/rows"


class Hub(http.server.ThreadingHTTPServer):
    """Serves files by name; a change of them is a new commit."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def commit(self) -> str:
        return digest(b"".join(self.files.values()))


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        api, files = f"/api/datasets/{NAME}", self.server.files
        if path.startswith(f"{api}/tree/"):
            self.reply(
                json.dumps(self.tree(path.split("/tree/")[1].partition("/")[2], "recursive=true" in query.lower()))
            )
        elif path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": name} for name in files]
            self.reply(
                json.dumps({"id": NAME, "sha": self.server.commit, "private": False, "siblings": siblings, "tags": []})
            )
        elif path.startswith(f"/datasets/{NAME}/resolve/"):
            name = path.split("/resolve/")[1].partition("/")[2]
            if name in files:
                self.reply(files[name], ETag=f'"{digest(files[name])}"', **{"X-Repo-Commit": self.server.commit})
            else:
                self.reply(b"", 404, **{"X-Error-Code": "EntryNotFound"})
        else:
            self.reply(b"{}", 404)

    def tree(self, under: str, recursive: bool) -> list[dict[str, object]]:
        start, found = f"{under}/" if under else "", {}
        for name, content in self.server.files.items():
            if not name.startswith(start):
                continue
            first, slash, _ = name.removeprefix(start).partition("/")
            if slash and not recursive:
                found[first] = {"type": "directory", "path": start + first, "oid": "0" * 40, "size": 0}
            else:
                found[name] = {"type": "file", "path": name, "oid": digest(content), "size": len(content)}
        return list(found.values())

    def reply(self, body: str | bytes, code: int = 200, **headers: str) -> None:
        content = body.encode() if isinstance(body, str) else body
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
