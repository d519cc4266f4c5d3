"""Login: passwords, cookies, the brake on guessing, and what an address needs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from veneer.studio import auth as module
from veneer.studio.auth import Auth, Throttle, load_secret
from veneer.studio.config import StudioConfig, is_loopback
from veneer.studio.errors import StudioError
from veneer.studio.users import Users, add_user

PASSWORD = "correct horse"


@pytest.fixture
def users(tmp_path: Path) -> Users:
    add_user(tmp_path / "users.json", "ann", PASSWORD)
    add_user(tmp_path / "users.json", "bob", PASSWORD)
    return Users(tmp_path / "users.json")


def test_passwords_are_kept_as_salted_hashes(users):
    records = json.loads(users.path.read_text())
    assert PASSWORD not in users.path.read_text()
    assert records["ann"] != records["bob"]
    assert users.path.stat().st_mode & 0o077 == 0
    assert users.check("ann", PASSWORD)
    assert not users.check("ann", "wrong horse")
    assert not users.check("eve", PASSWORD)


@pytest.mark.parametrize(("name", "password"), [("ann", "short"), ("../ann", PASSWORD), ("", PASSWORD)])
def test_users_that_cannot_be_are_refused(tmp_path, name, password):
    with pytest.raises(StudioError):
        add_user(tmp_path / "users.json", name, password)
    assert not (tmp_path / "users.json").exists()


def test_cookies_survive_a_restart_and_nothing_else(users, tmp_path):
    secret = load_secret(tmp_path / "secret")
    cookie = Auth(secret, users).cookie("ann")
    after = Auth(load_secret(tmp_path / "secret"), Users(users.path))
    assert after.read(cookie) == "ann"
    assert Auth(b"another secret", users).read(cookie) is None
    for forged in (
        "",
        "ann",
        cookie[:-1],
        cookie.replace(".", ".9", 1),
        after.cookie("bob").split(".")[0] + cookie[3:],
    ):
        assert after.read(forged) is None


def test_cookies_end(users, monkeypatch):
    auth = Auth(b"secret", users)
    cookie = auth.cookie("ann")
    over = time.time() + module.LIFETIME + 1
    monkeypatch.setattr(module.time, "time", lambda: over)
    assert auth.read(cookie) is None


def test_a_new_password_and_a_removed_user_end_sessions(users):
    auth = Auth(b"secret", users)
    ann, bob = auth.cookie("ann"), auth.cookie("bob")
    add_user(users.path, "ann", "another horse")
    assert (auth.read(ann), auth.read(bob)) == (None, "bob")
    users.path.write_text("{}")
    assert auth.read(bob) is None


def test_guessing_is_slowed_by_name_and_by_address():
    throttle = Throttle(limit=3, window=60)
    for _ in range(3):
        assert throttle.wait("as ann", "from here") == 0
        throttle.failed("as ann", "from here")
    assert throttle.wait("as ann") > 0
    assert throttle.wait("as bob", "from here") > 0
    assert throttle.wait("as bob", "from there") == 0


def test_a_brake_comes_off_and_forgets():
    throttle = Throttle(limit=1, window=0.0)
    throttle.failed("as ann")
    time.sleep(0.001)
    assert throttle.wait("as ann") == 0
    assert throttle._failures == {}


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("10.0.0.1", False), ("a.b", False)],
)
def test_only_this_machine_may_do_without_users(host, loopback):
    assert is_loopback(host) is loopback
    if loopback:
        StudioConfig(host=host).check()
    else:
        with pytest.raises(StudioError, match="--users"):
            StudioConfig(host=host).check()
        StudioConfig(host=host, users=Path("users.json")).check()


@pytest.mark.parametrize(
    ("asked", "target"),
    [
        (None, "/"),
        ("/?tab=runs&job=1", "/?tab=runs&job=1"),
        ("https://evil.example/?tab=runs", "/?tab=runs"),
        ("//evil.example", "/"),
        ("javascript:alert(1)", "/"),
    ],
)
def test_a_login_leads_to_this_page_only(asked, target):
    assert module._target(asked) == target
