"""Ray's tokens: since 2.59 a Ray asks everyone who talks to it for one.

A local `ray.init` writes a token into the user's HOME and asks for it; every `ray start` of that user asks for it from
then on, and who joins with an explicit address does not send it. So a Ray of our own gets a token that lives in its
processes' environment alone, and who joins sends the user's where there is one.
"""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def source(environment: Mapping[str, str] = os.environ) -> str | None:
    """Where the user's token is, in Ray's own order of looking, or None where there is none."""
    if environment.get(TOKEN):
        return f"${TOKEN}"
    if environment.get(TOKEN_PATH):
        return environment[TOKEN_PATH]
    kept = Path(environment.get("HOME", "~")).expanduser() / ".ray" / "auth_token"
    return str(kept) if kept.exists() else None


def of_own_ray(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Environment of a Ray that we start: the user's token or a new one, unless the user turned tokens off."""
    mode = environment.get(MODE, "token")
    if mode.lower() != "token":
        return {}
    return {MODE: mode} if source(environment) else {MODE: mode, TOKEN: secrets.token_hex(32)}


def of_joined_ray(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Environment in which we talk to a Ray that is there: with the user's token, if there is one."""
    return {MODE: "token"} if MODE not in environment and source(environment) else {}


def remedy(environment: Mapping[str, str] = os.environ) -> str:
    """What to do when a Ray does not take what `of_joined_ray` sends."""
    found = source(environment)
    turned_off = environment.get(MODE, "token").lower() != "token"
    if turned_off:
        return f"{MODE}={environment[MODE]} keeps ours back; export {MODE}=token"
    if found:
        return f"it is not the one in {found}; export {TOKEN_PATH}=FILE with the token of its head"
    return (
        f"none was found in ${TOKEN}, ${TOKEN_PATH} or ~/.ray/auth_token; copy ~/.ray/auth_token of its head here, or "
        f"export {TOKEN_PATH}=FILE"
    )
