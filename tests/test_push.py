"""Pushing an adapter to a stand-in for the hub: what goes up, what does not, and that it is found under its name again."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import constants

from s2t import hub
from s2t.cli.main import main
from s2t.model.adapter import AdapterConfig, SelectorAdapter, read_adapter_config
from s2t.model.load import load_model
from s2t.model.merged import adapter_folder

TOKEN, COMMIT, REPO = "hf_" + "secret" * 5, "c" * 40, "me/my-adapter"


class Hub(ThreadingHTTPServer):
    """Repositories in memory: name -> whether it is private, its files; every request is kept."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict] = {}
        self.asked: list[str] = []
        self.refuse: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass

    def reply(self, document, status=200, body=None, **headers):
        data = json.dumps(document).encode() if body is None else body
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self):
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        path, repos = self.path.split("?")[0], self.server.repos
        self.server.asked.append(path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply({"error": f"Invalid credentials {self.headers.get('Authorization')}"}, 401)
        if self.server.refuse:
            return self.reply({"error": f"You may not, {TOKEN}"}, self.server.refuse)
        if path == "/api/repos/create":
            asked = json.loads(sent)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            status = 409 if name in repos else 200
            visibility = asked.get("private", asked.get("visibility") == "private")
            repos.setdefault(name, {"private": visibility, "files": {"README.md": b"as it was"}})
            return self.reply({"url": f"{self.server.url}/{name}", "name": name}, status)
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        name = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            paths = [file["path"] for file in json.loads(sent)["files"]]
            return self.reply({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        for line in map(json.loads, sent.splitlines()):
            if line["key"] == "file":
                repos[name]["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{self.server.url}/{name}/commit/{COMMIT}"
        return self.reply({"success": True, "commitUrl": url, "commitOid": COMMIT})

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        self.server.asked.append(self.path)
        if parts[:2] == ["api", "models"] and (repo := self.server.repos.get("/".join(parts[2:4]))):
            files = {name: {"size": len(data), "oid": "0" * 40, "type": "file"} for name, data in repo["files"].items()}
            if "tree" in parts:
                return self.reply([{"path": name} | found for name, found in files.items()])
            siblings = [{"rfilename": name} for name in files]
            return self.reply(
                {"id": "/".join(parts[2:4]), "private": repo["private"], "sha": COMMIT, "siblings": siblings}
            )
        repo = self.server.repos.get("/".join(parts[:2]))
        data = repo["files"].get("/".join(parts[4:])) if repo and parts[2:3] == ["resolve"] else None
        if data is None:
            return self.reply({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        return self.reply(None, body=data, ETag=etag, X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A hub of this machine that the hub's client asks, logged in with TOKEN; its cache is empty."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", server.url, raising=False)
    monkeypatch.setattr(hub, "_ANSWERED", set())
    monkeypatch.setattr(hub, "_ASKED", {})
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def adapter(tmp_path):
    """An adapter folder with measured accuracies and with things that are nobody's business."""
    loaded = load_model("tiny:slm")
    torch.manual_seed(0)
    config = AdapterConfig("tiny:slm", loaded.fingerprint, lora_rank=2, thresholds={"criticality": 0.5})
    folder = tmp_path / "adapter"
    SelectorAdapter(loaded, config).save(folder)
    scores = {"accuracy": 0.625, "ci95": [0.5, 0.75], "num_problems": 64}
    found = {"task": "apples", "split": "test", "seed": 0, "strategies": {"s2t-local": scores}}
    (folder / "s2t_eval.json").write_text(json.dumps(found))
    (folder / ".env").write_text("KEY=1")
    (folder / "notes.txt").write_text("mine")
    return folder


def words(adapter, *more):
    return ["push", "--adapter", str(adapter), "--repo", REPO, *more]


def test_an_adapter_goes_up_and_is_found_under_its_name(stand_in, adapter, capsys):
    assert main([*words(adapter), "--json"]) == 0
    pushed = json.loads(capsys.readouterr().out)
    assert pushed["private"] is True
    assert pushed["url"] == f"{stand_in.url}/{REPO}"
    files = stand_in.repos[REPO]["files"]
    assert set(files) == set(pushed["files"]), "what else lies in the folder stays there"
    assert {"adapter_model.safetensors", "adapter_config.json", "s2t_config.json", "s2t_selector.safetensors"} <= set(
        files
    )
    for name, data in files.items():
        if name != "README.md":
            assert data == (adapter / name).read_bytes()
    found = adapter_folder(REPO)
    assert str(found) != REPO and read_adapter_config(found) == read_adapter_config(adapter)


def test_the_card_has_the_figures_and_the_name(stand_in, adapter):
    assert main(words(adapter)) == 0
    card = stand_in.repos[REPO]["files"]["README.md"].decode()
    assert "| s2t-local | 62.5 | 50.0 to 75.0 | 64 |" in card
    assert f'adapter="{REPO}"' in card and "THIS FOLDER" not in card
    front = card.split("---\n")[1]
    assert "base_model" not in front, "the hub takes names of its own models there alone"
    assert "THIS FOLDER" in (adapter / "README.md").read_text(), "the folder stays as it is"


def test_a_base_model_of_the_hub_stays_in_the_card(stand_in, adapter, capsys):
    path = adapter / "s2t_config.json"
    path.write_text(path.read_text().replace('"tiny:slm"', '"Qwen/Qwen2.5-0.5B"'))
    card = adapter / "README.md"
    card.write_text(card.read_text().replace("tiny:slm", "Qwen/Qwen2.5-0.5B"))
    assert main(words(adapter)) == 0
    assert 'base_model: "Qwen/Qwen2.5-0.5B"\n' in stand_in.repos[REPO]["files"]["README.md"].decode()
    assert "is not of the hub" not in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "is_private", "seen"), [([], True, "private"), (["--public"], False, "public")])
def test_it_is_private_unless_asked_for(flags, is_private, seen, stand_in, adapter, capsys):
    assert main(words(adapter, *flags)) == 0
    shown = capsys.readouterr()
    assert stand_in.repos[REPO]["private"] is is_private
    assert seen in shown.out and f"--adapter {REPO}" in shown.out
    assert TOKEN not in shown.out + shown.err


def test_a_repository_that_exists_is_updated_and_stays_as_public_as_it_was(stand_in, adapter, capsys):
    stand_in.repos[REPO] = {"private": False, "files": {}}
    assert main([*words(adapter), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["private"] is False
    assert "s2t_config.json" in stand_in.repos[REPO]["files"]


def test_without_figures_it_says_how_to_get_them(stand_in, adapter, capsys):
    (adapter / "s2t_eval.json").unlink()
    assert main(words(adapter)) == 0
    assert "the card has no accuracies; run s2t eval" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "said"), [(403, "another --repo"), (401, "hf auth login"), (400, "check the name")])
def test_a_refusal_is_one_line_without_the_token(status, said, stand_in, adapter, capsys):
    stand_in.refuse = status
    assert main(words(adapter)) == 2
    captured = capsys.readouterr()
    line = captured.err.splitlines()[-1]
    assert line.startswith(f"s2t: error: {REPO} cannot be pushed: ") and said in line
    assert TOKEN not in captured.out + captured.err
    assert REPO not in stand_in.repos


def test_without_a_login_or_a_hub_it_is_one_line(stand_in, adapter, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(adapter / "no-token"))
    assert main(words(adapter)) == 2
    assert "hf auth login" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(words(adapter)) == 2
    assert "cannot be pushed" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("repo", ["", "name", "a/b/c", "a b/c", "/x", "x/"])
def test_a_name_that_is_none_is_refused_before_anything(repo, stand_in, adapter, capsys):
    assert main(["push", "--adapter", str(adapter), "--repo", repo]) == 2
    assert "repo must be OWNER/NAME" in capsys.readouterr().err
    assert stand_in.asked == []


def test_what_is_no_sound_adapter_is_not_pushed(stand_in, adapter, tmp_path, capsys):
    (adapter / "adapter_model.safetensors").write_bytes(b"other weights")
    assert main(words(adapter)) == 2
    assert "is not the file that was saved" in capsys.readouterr().err
    (adapter / "adapter_model.safetensors").unlink()
    assert main(words(adapter)) == 2
    assert "lacks adapter_model.safetensors" in capsys.readouterr().err
    assert main(words(tmp_path)) == 2
    assert "pass the folder `s2t train` wrote" in capsys.readouterr().err
    assert stand_in.asked == []
