"""A small Hub server: the HTTP calls that create a model repository, commit to it and load from it.

Like the Hub, it stores large files on a server with another host name, to which no client may send a token.

    with HubServer(tokens={"hf_secret": "user"}) as hub:
        os.environ["HF_ENDPOINT"] = hub.url
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import yaml

LARGE = (".safetensors", ".bin")
FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


@dataclass
class File:
    content: bytes
    is_large: bool

    @property
    def oid(self) -> str:
        """The SHA-256 of a large file, git's SHA-1 of another."""
        if self.is_large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Commit:
    sha: str
    summary: str
    changed: list[str]
    files: dict[str, File]


@dataclass
class Repo:
    is_private: bool
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.add("main", "initial commit", {".gitattributes": File(b"", False)})

    def add(self, branch: str, summary: str, changed: dict[str, File], removed: tuple[str, ...] = ()) -> Commit:
        files = dict(self.at(branch).files) if branch in self.branches else {}
        files = {path: file for path, file in (files | changed).items() if path not in removed}
        told = json.dumps([len(self.commits), summary, {path: file.oid for path, file in files.items()}])
        commit = Commit(hashlib.sha1(told.encode()).hexdigest(), summary, [*changed, *removed], files)
        self.commits.append(commit)
        self.branches[branch] = commit.sha
        return commit

    def at(self, revision: str) -> Commit:
        sha = self.branches.get(revision, revision)
        return next(commit for commit in self.commits if commit.sha == sha)


class Refusal(Exception):
    """An answer that is not 200."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None, **more: str
    ) -> None:
        super().__init__(message)
        self.status, self.content = status, {"error": message, **more}
        named = {} if code is None else {"X-Error-Code": code}
        self.headers = {"X-Error-Message": message, **named, **(headers or {})}


@dataclass
class Answer:
    body: bytes | Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class HubServer:
    """Args: tokens: the users by their tokens. Each may write under their own name."""

    def __init__(self, tokens: dict[str, str]) -> None:
        self.tokens = tokens
        self.clear()
        self.hub, self.storage = self.listen(self.answer), self.listen(self.answer_storage)
        self.url = f"http://localhost:{self.hub.server_port}"
        self.storage_url = f"http://127.0.0.1:{self.storage.server_port}"

    def clear(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}  # the other server's, by SHA-256
        self.faults: dict[str, int] = {}  # the status with which requests are refused whose path holds the key
        self.requests: list[str] = []

    def __enter__(self) -> Self:
        self.threads = [threading.Thread(target=server.serve_forever) for server in (self.hub, self.storage)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for server in (self.hub, self.storage):
            server.shutdown()
            server.server_close()
        for thread in self.threads:
            thread.join()

    @staticmethod
    def listen(answer: Callable[["Request"], Answer]) -> ThreadingHTTPServer:
        handler = type("Handler", (Request,), {"answer": staticmethod(answer)})
        return ThreadingHTTPServer(("127.0.0.1", 0), handler)

    def environment(self, token: str | None = None) -> dict[str, str]:
        """The variables that lead huggingface_hub here. Its other protocol, Xet, would lead elsewhere."""
        variables = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return variables if token is None else {**variables, "HF_TOKEN": token}

    # ------------------------------------------------------------------------------------------------------- storage

    def answer_storage(self, request: "Request") -> Answer:
        if request.headers.get("Authorization"):
            raise Refusal(400, "a token was sent to the storage")
        self.requests.append(f"{request.command} storage")
        if "storage" in self.faults:
            raise Refusal(self.faults["storage"], "the storage has a fault")
        oid = request.path.strip("/")
        if request.command == "PUT":
            if hashlib.sha256(request.body).hexdigest() != oid:
                raise Refusal(400, "the content is not what its name says")
            self.blobs[oid] = request.body
            return Answer()
        return Answer(self.blobs[oid], headers={"Content-Type": "application/octet-stream"})

    # ----------------------------------------------------------------------------------------------------------- hub

    def answer(self, request: "Request") -> Answer:
        path = unquote(urlsplit(request.path).path)
        self.requests.append(f"{request.command} {path}")
        for part, status in self.faults.items():
            if part in path:
                raise Refusal(status, "the server has a fault")
        for method, pattern, action in (
            ("GET", r"/api/whoami-v2", self.whoami),
            ("POST", r"/api/repos/create", self.create),
            ("POST", r"/api/validate-yaml", self.validate_yaml),
            ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>.+)", self.preupload),
            ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>.+)", self.commit),
            ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>.+)", self.branch),
            ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", self.large_files),
            ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", self.info),
            ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", self.tree),
            ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", self.resolve),
        ):
            match = re.fullmatch(pattern, path)
            if match and method == request.command.replace("HEAD", "GET"):
                return action(request, **match.groupdict())
        raise Refusal(404, f"no such address: {request.command} {path}")

    def user(self, request: "Request") -> str | None:
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.tokens.get(token)

    def readable(self, request: "Request", repo: str) -> Repo:
        user = self.user(request)
        found = self.repos.get(repo)
        if found is None or (found.is_private and user != repo.split("/")[0]):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        return found

    def writable(self, request: "Request", repo: str) -> Repo:
        found = self.readable(request, repo)
        self.check_owner(request, repo.split("/")[0])
        return found

    def check_owner(self, request: "Request", owner: str) -> None:
        user = self.user(request)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if user != owner:
            raise Refusal(403, f"You don't have the rights to create or change a model under the namespace {owner!r}")

    def at(self, found: Repo, revision: str | None) -> Commit:
        try:
            return found.at(revision or "main")
        except StopIteration:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound") from None

    def whoami(self, request: "Request") -> Answer:
        user = self.user(request)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return Answer({"type": "user", "name": user, "orgs": []})

    def create(self, request: "Request") -> Answer:
        asked = request.json()
        owner = asked.get("organization") or self.user(request)
        self.check_owner(request, owner)
        repo = f"{owner}/{asked['name']}"
        if repo in self.repos:
            raise Refusal(409, "You already created this model repo", url=f"{self.url}/{repo}")
        self.repos[repo] = Repo(is_private=asked.get("visibility") == "private")
        return Answer({"url": f"{self.url}/{repo}", "id": repo})

    def validate_yaml(self, request: "Request") -> Answer:
        match = FRONT_MATTER.match(request.json()["content"])
        metadata = yaml.safe_load(match[1]) if match else None
        if not isinstance(metadata, dict):
            return Answer({"errors": [{"message": "expected metadata between lines of ---"}], "warnings": []}, 400)
        return Answer({"errors": [], "warnings": []})

    def preupload(self, request: "Request", repo: str, revision: str) -> Answer:
        commit = self.at(self.writable(request, repo), revision)
        return Answer(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                        "oid": commit.files[file["path"]].oid if file["path"] in commit.files else None,
                    }
                    for file in request.json()["files"]
                ]
            }
        )

    def large_files(self, request: "Request", repo: str) -> Answer:
        self.writable(request, repo)
        objects = []
        for asked in request.json()["objects"]:
            upload = {"upload": {"href": f"{self.storage_url}/{asked['oid']}", "header": {}}}
            objects.append(asked if asked["oid"] in self.blobs else {**asked, "actions": upload})
        content = {"transfer": "basic", "objects": objects}
        return Answer(content, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def commit(self, request: "Request", repo: str, revision: str) -> Answer:
        found = self.writable(request, repo)
        self.at(found, revision)
        header: dict[str, Any] = {}
        changed: dict[str, File] = {}
        removed: list[str] = []
        for line in request.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    header = value
                case "file":
                    changed[value["path"]] = File(base64.b64decode(value["content"]), is_large=False)
                case "lfsFile":
                    if value["oid"] not in self.blobs:
                        raise Refusal(400, f"{value['path']} was not uploaded")
                    changed[value["path"]] = File(self.blobs[value["oid"]], is_large=True)
                case "deletedFile":
                    removed.append(value["path"])
                case key:
                    raise Refusal(400, f"unknown operation {key}")
        made = found.add(revision, header["summary"], changed, tuple(removed))
        return Answer({"commitUrl": f"{self.url}/{repo}/commit/{made.sha}", "commitOid": made.sha, "success": True})

    def branch(self, request: "Request", repo: str, branch: str) -> Answer:
        found = self.writable(request, repo)
        if branch in found.branches:
            raise Refusal(409, f"Reference already exists: {branch}")
        found.branches[branch] = self.at(found, request.json().get("startingPoint")).sha
        return Answer()

    def info(self, request: "Request", repo: str, revision: str | None) -> Answer:
        found = self.readable(request, repo)
        commit = self.at(found, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        return Answer(
            {
                "id": repo,
                "sha": commit.sha,
                "private": found.is_private,
                "siblings": siblings,
                "tags": [],
                "author": None,
            }
        )

    def tree(self, request: "Request", repo: str, revision: str, folder: str | None) -> Answer:
        commit = self.at(self.readable(request, repo), revision)
        entries = []
        for path, file in commit.files.items():
            if folder is None or path.startswith(f"{folder}/"):
                entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
                large = {"oid": file.oid, "size": len(file.content), "pointerSize": 134}
                entries.append({**entry, "lfs": large} if file.is_large else entry)
        if folder is not None and not entries:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        return Answer(entries)

    def resolve(self, request: "Request", repo: str, revision: str, path: str) -> Answer:
        commit = self.at(self.readable(request, repo), revision)
        about = {"X-Repo-Commit": commit.sha}
        file = commit.files.get(path)
        if file is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", about)
        if not file.is_large:
            return Answer(file.content, headers={**about, "ETag": f'"{file.oid}"'})
        linked = {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        return Answer(status=302, headers={**about, **linked, "Location": f"{self.storage_url}/{file.oid}"})


class Request(BaseHTTPRequestHandler):
    """Reads a request whole, and sends what `answer` makes of it."""

    protocol_version = "HTTP/1.1"
    answer: Callable[["Request"], Answer]
    body: bytes

    def handle_request(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            answer = self.answer(self)
        except Refusal as refusal:
            answer = Answer(refusal.content, refusal.status, refusal.headers)
        is_json = not isinstance(answer.body, bytes)
        body = json.dumps(answer.body).encode() if is_json else answer.body
        headers = {"Content-Type": "application/json"} if is_json else {}
        self.send_response(answer.status)
        for name, value in {**headers, **answer.headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def log_message(self, format: str, *args: Any) -> None:
        pass
