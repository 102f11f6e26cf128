"""A stand-in for the hub on loopback: repositories of models, as `huggingface_hub` makes, writes and reads them.

As on the hub, what ``.gitattributes`` names there by default, ``*.safetensors`` among it, is stored by Git LFS: sent to
a store of its own before the commit, which then holds its hash alone, and read from that store by a redirection. Xet,
which `huggingface_hub` prefers where its package is there, isn't imitated.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading
from dataclasses import dataclass, field

TOKEN = "hf_writer"


@dataclass
class Repository:
    """Its commits, the newest last: each maps names to contents."""

    private: bool = False
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b""}])
    messages: list[str] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    """By their SHA-256, what came by LFS."""

    def at(self, revision: str) -> dict[str, bytes] | None:
        if revision == "main":
            return self.commits[-1]
        return next((files for files in self.commits if commit_of(files) == revision), None)


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(json.dumps({name: digest(content) for name, content in files.items()}).encode()).hexdigest()


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def is_large(name: str) -> bool:
    return name.endswith(".safetensors")


class Hub(http.server.ThreadingHTTPServer):
    """Serves repositories by name, and counts requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.failing: int | None = None
        self.store_fails: int | None = None
        self.requests: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def store_url(self) -> str:
        """Under another host's name: what is sent to the hub alone isn't sent there."""
        return f"http://localhost:{self.server_port}/store"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0].strip("/")
        self.server.requests.append(f"{self.command} {path}")
        writes = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.server.failing:
            return self.reply({"error": "out of order"}, self.server.failing)
        if path == "api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if ".git/info/lfs/" in path:
            return self.large(*path.split(".git/info/lfs/")) if writes else self.reply({"error": "who?"}, 401)
        if path.startswith("store/"):
            return self.store(path)
        if path == "api/repos/create":
            return self.create(json.loads(self.body)) if writes else self.reply({"error": "who?"}, 401)
        api = path.startswith("api/models/")
        parts = path.removeprefix("api/models/").split("/")
        name, action, revision, file = "/".join(parts[:2]), *[*parts[2:], "", "", ""][:2], "/".join(parts[4:])
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not writes):
            return self.reply({}, 404, **{"X-Error-Code": "RepoNotFound"})
        files = repository.at(revision or "main")
        if files is None:
            return self.reply({}, 404, **{"X-Error-Code": "RevisionNotFound"})
        if not api and action == "resolve":
            return self.resolve(files, file)
        if action.startswith("xet-"):
            return self.reply({"error": "no Xet here"}, 404)
        if action in ("", "revision"):
            siblings = [{"rfilename": found} for found in files]
            return self.reply({"id": name, "sha": commit_of(files), "private": False, "siblings": siblings, "tags": []})
        if action == "tree":
            rows = [
                {"type": "file", "path": found, "oid": digest(content), "size": len(content)}
                for found, content in files.items()
            ]
            return self.reply(rows)
        if not writes:
            return self.reply({"error": "read only"}, 403)
        if action == "preupload":
            asked = json.loads(self.body)["files"]
            modes = {of["path"]: "lfs" if is_large(of["path"]) else "regular" for of in asked}
            return self.reply(
                {"files": [{"path": of, "uploadMode": mode, "shouldIgnore": False} for of, mode in modes.items()]}
            )
        return self.commit(name, repository)

    def create(self, asked: dict[str, object]) -> None:
        name = f"{asked.get('organization')}/{asked['name']}"
        url = {"url": f"{self.server.url}/{name}"}
        if name in self.server.repositories:
            return self.reply({"error": "there already", **url}, 409)
        self.server.repositories[name] = Repository(
            private=bool(asked.get("private")) or asked.get("visibility") == "private"
        )
        return self.reply(url)

    def resolve(self, files: dict[str, bytes], file: str) -> None:
        commit = {"X-Repo-Commit": commit_of(files)}
        if file not in files:
            return self.reply({}, 404, **commit, **{"X-Error-Code": "EntryNotFound"})
        if is_large(file):
            oid = hashlib.sha256(files[file]).hexdigest()
            name = self.path.strip("/").partition("/resolve/")[0]
            linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(files[file]))}
            return self.reply({}, 302, Location=f"{self.server.store_url}/{name}/{oid}", **linked, **commit)
        return self.reply(files[file], ETag=f'"{digest(files[file])}"', **commit)

    def large(self, name: str, action: str) -> None:
        """What LFS asks before and after a file is sent."""
        asked = json.loads(self.body)
        stored = self.server.repositories[name].stored
        if action == "verify":
            return self.reply({}, 200 if len(stored.get(asked["oid"], b"")) == asked["size"] else 404)
        assert asked["operation"] == "upload"
        objects = []
        for found in asked["objects"]:
            actions = {
                "upload": {"href": f"{self.server.store_url}/{name}/{found['oid']}"},
                "verify": {"href": f"{self.server.url}/{name}.git/info/lfs/verify"},
            }
            objects.append(found if found["oid"] in stored else {**found, "actions": actions})
        return self.reply({"transfer": "basic", "objects": objects})

    def store(self, path: str) -> None:
        """Files themselves; like the hub's, the store's addresses want no token, which nobody else may see."""
        assert "Authorization" not in self.headers
        _, organisation, repository, oid = path.split("/")
        stored = self.server.repositories[f"{organisation}/{repository}"].stored
        if self.server.store_fails:
            return self.reply({}, self.server.store_fails)
        if self.command == "PUT":
            assert hashlib.sha256(self.body).hexdigest() == oid
            stored[oid] = self.body
            return self.reply({})
        return self.reply(stored[oid], ETag=f'"{oid}"')

    def commit(self, name: str, repository: Repository) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = dict(repository.commits[-1])
        for line in lines:
            if line["key"] == "header":
                repository.messages.append(line["value"]["summary"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = repository.stored[line["value"]["oid"]]
            else:
                assert not is_large(line["value"]["path"])
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        repository.commits.append(files)
        commit = commit_of(files)
        self.reply({"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit, "success": True})

    def reply(self, body: object, code: int = 200, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for key, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
