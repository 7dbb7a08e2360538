"""A small Hub for tests: the endpoints that huggingface_hub needs to push and load a model, in memory, on loopback.

Run as a script, this file is the client's side: a process with HF_ENDPOINT in its environment, which huggingface_hub
reads only once. It runs command lines for the tests, one after the other, so that torch is imported once.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

if not __package__:
    # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

TOKEN = "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"


@dataclass
class Repository:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    commits: int = 0

    def sha(self, branch: str) -> str:
        return hashlib.sha1(
            json.dumps(sorted((k, _sha256(v)) for k, v in self.branches[branch].items())).encode()
        ).hexdigest()


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD /path" matches."""

    pattern: str
    kind: str | int
    """An HTTP status; "drop": the connection closes during the request; "stall": no answer for a minute; "lose the
    answer": the request is carried out, but the connection closes before the answer."""
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))


class FakeHub:
    """Repositories, stored LFS objects, the requests seen and the faults to come."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []  # "PUT /lfs/..."
        self.faults: list[Fault] = []
        self.role = "write"
        self.turns_public = False  # somebody changes a repository's visibility while it is pushed to
        self.licence: dict[str, str] = {}
        self.lock = threading.Lock()
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def forget(self):
        """Empty the Hub."""
        for held in (self.repositories, self.objects, self.requests, self.faults, self.licence):
            held.clear()
        self.role = "write"
        self.turns_public = False

    def fail(self, pattern: str, kind: str | int, times: int = 1, **headers: str):
        self.faults.append(
            Fault(pattern, kind, times, {name.replace("_", "-"): value for name, value in headers.items()})
        )

    def seen(self, pattern: str) -> list[str]:
        return [request for request in self.requests if re.search(pattern, request)]

    def fault_for(self, request: str) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    is_answer_lost = False

    def log_message(self, *args):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):  # the client gave up
            super().handle()

    def do_any(self):
        path = unquote(urlsplit(self.path).path)
        fault = self.hub.fault_for(f"{self.command} {path}")
        if fault is not None and fault.kind == "drop":
            self.rfile.read(min(10, int(self.headers.get("Content-Length", 0))))  # in the middle of an upload
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = self._chunks()
        if fault is not None and fault.kind == "stall":
            time.sleep(60)
            self.close_connection = True
            return
        if fault is not None and fault.kind == "lose the answer":
            self.is_answer_lost = True
        elif fault is not None:  # a careless server: it quotes the credentials it was sent
            return self.answer(
                {"error": f"fault {fault.kind} for {self.headers.get('Authorization')}"}, int(fault.kind), fault.headers
            )
        if path.startswith("/lfs/"):
            return self.store(path.removeprefix("/lfs/"), body)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid user token."}, 401)
        for pattern, method in (
            (r"GET /api/whoami-v2", self.whoami),
            (r"POST /api/repos/create", self.create),
            (r"POST /api/validate-yaml", self.validate),
            (r"POST /api/models/([^/]+/[^/]+)/preupload/(.+)", self.preupload),
            (r"POST /api/models/([^/]+/[^/]+)/commit/(.+)", self.commit),
            (r"POST /api/models/([^/]+/[^/]+)/branch/(.+)", self.branch),
            (r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)(/.*)?", self.tree),
            (r"GET /api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self.info),
            (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            (r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        ):
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                names = match.groups()
                if names and names[0] not in self.hub.repositories:
                    return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
                return method(*names, **({"body": body} if self.command == "POST" else {}))
        return self.answer({"error": f"no such endpoint: {self.command} {path}"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = do_any  # noqa: N815

    def _chunks(self) -> bytes:
        parts = []
        while length := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None):
        if self.is_answer_lost:
            self.is_answer_lost = False
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        return None

    def files(self, repo: str, revision: str | None) -> dict[str, bytes] | None:
        branches, repository = self.hub.repositories[repo].branches, self.hub.repositories[repo]
        return next(
            (files for name, files in branches.items() if (revision or "main") in (name, repository.sha(name))), None
        )

    def no_revision(self):
        return self.answer({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})

    # ------------------------------------------------------------------------------------------------------- endpoints

    def whoami(self):
        self.answer(
            {
                "type": "user",
                "name": "user",
                "orgs": [{"name": "team"}],
                "auth": {"accessToken": {"role": self.hub.role}},
            }
        )

    def create(self, body):
        asked = json.loads(body)
        repo = f"{asked['organization'] or 'user'}/{asked['name']}"
        if repo in self.hub.repositories:
            return self.answer({"error": "You already created this model repo"}, 409)
        private = asked["visibility"] == "private" if asked.get("visibility") else bool(asked.get("private"))
        self.hub.repositories[repo] = Repository(private)
        return self.answer({"url": f"{self.hub.url}/{repo}", "name": repo})

    def validate(self, body):
        self.answer({"warnings": [], "errors": []})

    def info(self, repo, revision):
        if (files := self.files(repo, revision)) is None:
            return self.no_revision()
        repository = self.hub.repositories[repo]
        card = {"license": self.hub.licence[repo]} if repo in self.hub.licence else {}
        siblings = [{"rfilename": name} for name in files]
        head = next(repository.sha(name) for name, found in repository.branches.items() if found is files)
        return self.answer(
            {"id": repo, "_id": "0", "sha": head, "private": repository.private, "siblings": siblings, "cardData": card}
        )

    def branch(self, repo, name, body):
        branches = self.hub.repositories[repo].branches
        if name in branches:
            return self.answer({"error": "Reference already exists"}, 409)
        branches[name] = dict(branches["main"])
        return self.answer({})

    def tree(self, repo, revision, folder):
        files = self.files(repo, revision)
        if files is None:
            return self.no_revision()
        entries: list[dict[str, Any]] = []
        for path, content in sorted(files.items()):
            if path.startswith((folder or "/")[1:]):
                entries.append({"type": "file", "path": path, "size": len(content), "oid": _git_sha1(content)})
                if _is_lfs(path):
                    entries[-1]["lfs"] = {"size": len(content), "oid": _sha256(content), "pointerSize": 130}
        if not entries and folder:
            return self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        return self.answer(entries)

    def preupload(self, repo, revision, body):
        files = self.files(repo, revision)
        if files is None:
            return self.no_revision()
        found = []
        for asked in json.loads(body)["files"]:
            path, lfs, there = asked["path"], _is_lfs(asked["path"]), files.get(asked["path"])
            oid = None if there is None else _sha256(there) if lfs else _git_sha1(there)
            found.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
        return self.answer({"files": found})

    def batch(self, repo, body):
        objects = []
        for asked in json.loads(body)["objects"]:
            objects.append({"oid": asked["oid"], "size": asked["size"]})
            if asked["oid"] not in self.hub.objects:
                objects[-1]["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}
        return self.answer({"transfer": "basic", "objects": objects})

    def store(self, oid, body):
        if _sha256(body) != oid:
            return self.answer({"error": "the content is not what was announced"}, 400)
        self.hub.objects[oid] = body
        return self.answer(b"")

    def commit(self, repo, revision, body):
        files, repository = self.files(repo, revision), self.hub.repositories[repo]
        repository.private = repository.private and not self.hub.turns_public
        if files is None:
            return self.no_revision()
        new = dict(files)
        for line in body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.answer({"error": f"no object {value['oid']}"}, 400)
                new[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                del new[value["path"]]
        repository.branches[next(name for name, found in repository.branches.items() if found is files)] = new
        repository.commits += 1
        return self.answer({"commitUrl": f"{self.hub.url}/{repo}/commit/x", "commitOid": repository.sha(revision)})

    def resolve(self, repo, revision, path):
        files = self.files(repo, revision)
        if files is None:
            return self.no_revision()
        if path not in files:
            return self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        content, repository = files[path], self.hub.repositories[repo]
        head = next(repository.sha(name) for name, found in repository.branches.items() if found is files)
        headers = {"X-Repo-Commit": head, "ETag": f'"{_git_sha1(content)}"'}
        if _is_lfs(path):
            headers |= {"X-Linked-Etag": f'"{_sha256(content)}"', "X-Linked-Size": str(len(content))}
        return self.answer(content, headers=headers)


# --------------------------------------------------------------------------------------------------- the client's side


@dataclass
class Outcome:
    status: int
    out: str
    err: str
    waits: list[float]  # seconds that were asked of time.sleep

    def shown(self) -> str:
        return self.out + self.err

    def error_line(self) -> str:
        """The last line on stderr, after a command that ended with one line and no traceback."""
        assert self.err.count("error: ") == 1, self.shown()
        assert "Traceback" not in self.shown(), self.shown()
        return self.err.strip().splitlines()[-1]


class Client:
    """A process that pushes to and loads from `hub`, with an empty cache and no token of its own."""

    def __init__(self, hub: FakeHub, folder: Path):
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
        }
        environment |= {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(folder),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        environment |= {"NO_PROXY": "*", "no_proxy": "*", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            cwd=Path(__file__).resolve().parents[2],
        )  # fmt: skip

    def __call__(self, module: str, *arguments, **environment: str) -> Outcome:
        """Run `python -m matrix_llm.<module> arguments` with HF_TOKEN and `environment`; "load" is `_load`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        order = {
            "module": module,
            "arguments": [str(a) for a in arguments],
            "environment": {"HF_TOKEN": TOKEN, **environment},
        }
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return Outcome(**json.loads(self.process.stdout.readline()))

    def close(self):
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def _load(local: str, repo: str, cache: str, base: str = "") -> int:
    """Print the largest difference of the logits of a pushed model and of the folder that it was pushed from."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load(source: str):
        if not base:
            return AutoModelForCausalLM.from_pretrained(source, cache_dir=cache)
        return PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, cache_dir=cache), source, cache_dir=cache
        )

    ids = AutoTokenizer.from_pretrained(repo, cache_dir=cache)("Question: 1 + 2 = ?", return_tensors="pt")
    with torch.no_grad():
        print((load(repo).eval()(**ids).logits - load(local).eval()(**ids).logits).abs().max().item())
    return 0


def _serve_orders():
    environment = dict(os.environ)
    from matrix_llm import train
    from matrix_llm.fetch import command as fetching
    from matrix_llm.publish import client, command

    really_sleep, waits = time.sleep, []

    def sleep(seconds):  # waits are recorded instead of waited
        waits.append(seconds)
        really_sleep(min(seconds, 0.01))

    time.sleep = sleep
    client.TIMEOUT = 0.5
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        order = json.loads(line)
        os.environ.clear()
        os.environ.update({**environment, **order["environment"]})
        waits.clear()
        mains = {"hub": command.main, "train": train.main, "fetch": fetching.main, "load": lambda a: _load(*a)}
        run = mains[order["module"]]
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            try:
                status = run(order["arguments"])
            except SystemExit as error:
                status = int(error.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
                status = 99
            sys.stdout.flush()
            sys.stderr.flush()
            for file in (out, err):
                file.seek(0)
            answers.write(
                json.dumps({"status": status, "out": out.read(), "err": err.read(), "waits": list(waits)}) + "\n"
            )
            answers.flush()


if __name__ == "__main__":
    _serve_orders()
