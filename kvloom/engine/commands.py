"""The command `kvloom serve`."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter

from kvloom.errors import KvloomError

__all__ = ["serve"]

SHARE = 4  # of free memory, one part in so many is for caches unless said otherwise
Repeated = Annotated[list[str] | None, Parameter(negative="")]


def serve(
    model: str,
    *,
    cache: str = "full",
    allow_cache: Repeated = None,
    adapter: Repeated = None,
    adapters: Path | None = None,
    store: Repeated = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    kv_memory: str | None = None,
    max_model_len: int | None = None,
    served_model_name: Repeated = None,
    api_key: Annotated[str, Parameter(env_var="KVLOOM_API_KEY")] = "",
    max_concurrent: int = 2048,
    max_body: str = "32MiB",
    chunk: int = 512,
    part: int = 256,
    drain: float = 30.0,
) -> None:
    """Serve a model over caches of a recipe, with OpenAI's API. Many requests share each step; what prompts begin alike with is read once.

    The server listens at http://127.0.0.1:8000/v1 for any OpenAI client; a live page is at http://127.0.0.1:8000/, numbers for
    Prometheus at /metrics. SIGTERM or Ctrl-C: nothing new is taken, what runs is answered.

    Example: kvloom serve nano

    Example: kvloom serve Qwen/Qwen3-0.6B --cache "kivi(bits=4)" --allow-cache full --kv-memory 4GiB

    Then: curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"messages": [{"role": "user", "content": "Hello"}]}'

    Args:
        model: Folder, hub id or "nano".
        cache: The recipe of all caches. One that packed steps can't serve is refused at once, with the reason.
        allow_cache: A recipe that a request may ask for by its field "cache"; give it once per recipe.
        adapter: A LoRA adapter in PEFT's format, as NAME=FOLDER; give it once per adapter. Clients ask for it as model NAME.
        adapters: A folder of adapters, each called by its folder's name. Thousands may be there; those in use share the memory of caches.
        store: Where beginnings of prompts are kept beyond the memory and the life of this server, as in file:///var/kv?max=20GiB, redis://HOST or
            s3://BUCKET; give it again for slower tiers behind it. One that is down costs time, never an answer.
        host: Address to listen on. 0.0.0.0 lets other machines in; think of --api-key then.
        port: Port to listen on; 0: any that is free.
        kv_memory: Bytes for all caches together, as in 4GiB. Without it a quarter of the memory that is free at the start. No more is ever
            taken: requests that don't fit wait.
        max_model_len: Longest text, prompt and answer together, in tokens. Without it: what the model was made for.
        served_model_name: Name that clients call the model by, instead of MODEL; give it again for more names.
        api_key: What clients must send as "Authorization: Bearer ...". Better in the variable KVLOOM_API_KEY, which `ps` doesn't show.
        max_concurrent: Answers in work at once, those that wait included. Beyond it a client gets 429 and comes again later.
        max_body: Bytes of one request's body.
        chunk: Tokens of one step, of all requests together. Fewer: answers flow more evenly while long prompts are read. More: prompts
            are read faster.
        part: Prompts are cut at multiples of so many tokens, and kept there for prompts that begin alike.
        drain: Seconds for what runs when the server is stopped.
    """
    try:
        from kvloom.engine.run import Settings, run
        from kvloom.store.tier import size_of
    except ModuleNotFoundError as error:
        raise KvloomError(f"kvloom serve needs {error.name}: pip install 'kvloom[serve]'.") from error

    def size(option: str, text: str) -> int:
        try:
            return size_of(text)
        except KvloomError as error:
            raise KvloomError(f"{option} {text!r} is no size in bytes; write it as in 4GiB or 500MB.") from error

    for option, value, least in (("--chunk", chunk, 1), ("--part", part, 1), ("--max-concurrent", max_concurrent, 1)):
        if value < least:
            raise KvloomError(f"{option} {value} must be at least {least}.")
    known = _adapters(adapter or [], adapters)
    memory = None if kv_memory is None else size("--kv-memory", kv_memory)
    if memory is None:
        free = free_memory()
        memory = free // SHARE
        note = f"a quarter of {free / 2**30:.1f} GiB that are free; --kv-memory sets it"
    else:
        note = "as --kv-memory says"
    body = size("--max-body", max_body)
    with _listen(host, port) as line:  # before a model is loaded
        settings = Settings(
            model=model, cache=cache, allowed=allow_cache or [], memory=memory, note=note, context=max_model_len,
            names=served_model_name or [model], key=api_key, most=max_concurrent, body=body, chunk=chunk, part=part, drain=drain, adapters=known,
            store=store or [], line=line, tell=_tell,
        )  # fmt: skip
        _many_files()
        with suppress(KeyboardInterrupt):
            run(settings)


def _adapters(given: list[str], folder: Path | None) -> dict[str, str]:
    """Folders of adapters by name."""
    found: dict[str, str] = {}
    if folder is not None:
        if not folder.is_dir():
            raise KvloomError(f"--adapters {str(folder)!r} is no folder.")
        found = {path.parent.name: str(path.parent) for path in sorted(folder.glob("*/adapter_config.json"))}
        if not found:
            raise KvloomError(f"--adapters {str(folder)!r} holds no adapters: folders with an adapter_config.json.")
    for text in given:
        name, equals, path = text.partition("=")
        if not (name and equals and path) or not (Path(path) / "adapter_config.json").is_file():
            raise KvloomError(f"--adapter {text!r} is not NAME=FOLDER with an adapter_config.json in that folder.")
        found[name] = path
    return found


def free_memory() -> int:
    """Bytes that are free on the device that models are loaded to."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    with suppress(OSError, ValueError, IndexError):
        for text in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if text.startswith("MemAvailable:"):
                return min(int(text.split()[1]) * 1024, _allowed())
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _allowed() -> int:
    """Bytes left to this process's control group; containers see the whole machine's memory otherwise."""
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    return sys.maxsize


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise KvloomError(
            f"--host {host} --port {port}: cannot listen there ({error}). Choose another port."
        ) from error


def _many_files() -> None:
    """Each client takes a file descriptor; the usual limit of 1,024 would be reached."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _tell(text: str, *_: Any) -> None:
    print(text, file=sys.stderr, flush=True)
