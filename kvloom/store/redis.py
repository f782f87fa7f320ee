"""Chunks in a Redis or Valkey server: redis://host:6379/0?max=10GiB&timeout=2"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvloom.errors import StoreError, TierError
from kvloom.store.extra import need
from kvloom.store.frame import Buffer
from kvloom.store.tier import Address, Deadline, Facts, Tier, TierFull, TierStat, TierTimeout, check_key

__all__ = ["RedisTier"]

# KEYS: chunk, uses (sorted set), sizes (hash), bytes held. ARGV: data, now, max (0: none), name of the prefix, key.
# One script, so that two clients never both believe that there is room.
PUT = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
local n, max = #ARGV[1], tonumber(ARGV[3])
local old = redis.call('HGET', KEYS[3], ARGV[5])
if old then redis.call('DECRBY', KEYS[4], old) redis.call('HDEL', KEYS[3], ARGV[5]) redis.call('ZREM', KEYS[2], ARGV[5]) end
if max > 0 then
  if n > max then return -1 end
  while tonumber(redis.call('GET', KEYS[4]) or '0') + n > max do
    local oldest = redis.call('ZPOPMIN', KEYS[2])
    if #oldest == 0 then return -1 end
    redis.call('DEL', ARGV[4] .. oldest[1])
    local size = redis.call('HGET', KEYS[3], oldest[1])
    if size then redis.call('DECRBY', KEYS[4], size) redis.call('HDEL', KEYS[3], oldest[1]) end
  end
end
redis.call('SET', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[2], ARGV[2], ARGV[5])
redis.call('HSET', KEYS[3], ARGV[5], n)
redis.call('INCRBY', KEYS[4], n)
return 1
"""
DELETE = """
local there = redis.call('DEL', KEYS[1])
local size = redis.call('HGET', KEYS[3], ARGV[1])
if size then redis.call('DECRBY', KEYS[4], size) redis.call('HDEL', KEYS[3], ARGV[1]) end
redis.call('ZREM', KEYS[2], ARGV[1])
return there
"""


class RedisTier(Tier):
    """`max` is held by the server's script, over all clients; the least recently used leave. No pins, no quotas."""

    def __init__(self, client: Any, name: str, max: int | None = None, prefix: str = "kvloom:") -> None:
        """`client`: a redis.Redis with timeouts set, and without decoding of answers."""
        self.client, self.name, self.max, self.prefix = client, name, max, prefix
        self._books = [f"{prefix}uses", f"{prefix}sizes", f"{prefix}bytes"]

    @classmethod
    def open(cls, address: Address) -> RedisTier:
        address.only("max", "timeout")
        redis = need("redis")
        retry = need("redis.retry").Retry(need("redis.backoff").NoBackoff(), 1)  # servers close idle connections
        timeout = address.timeout()
        try:
            client = redis.Redis.from_url(
                address.full,
                socket_timeout=timeout,
                socket_connect_timeout=timeout,
                retry=retry,
                protocol=2,
                socket_read_size=1 << 20,  # chunks are large: in steps of 64 KiB, reading takes nearly twice as long
            )
        except ValueError as error:
            raise StoreError(f"{address.shown}: {error}. Write it as in redis://host:6379/0.") from error
        return cls(client, address.shown, address.max())

    @contextmanager
    def _errors(self) -> Iterator[None]:
        redis = need("redis")
        try:
            yield
        except redis.exceptions.TimeoutError as error:
            raise TierTimeout(f"{self.name}: {error}") from error
        except redis.exceptions.OutOfMemoryError as error:
            raise TierFull(f"{self.name}: {error}") from error
        except (redis.exceptions.RedisError, OSError) as error:
            raise TierError(f"{self.name}: {error}") from error

    def _name(self, key: str) -> str:
        return self.prefix + check_key(key)

    def get(self, key: str, start: int, stop: int, deadline: Deadline) -> Buffer | None:
        name = self._name(key)
        with self._errors():
            pipe = self.client.pipeline(transaction=False)
            pipe.getrange(name, start, stop - 1)
            pipe.zadd(self._books[0], {key: time.time()}, xx=True)
            # a server without memory refuses to note the use; what it has can still be read
            data = pipe.execute(raise_on_error=False)[0]
            if isinstance(data, Exception):
                raise data
            # an absent chunk and a range behind its end look the same
            return data if data or (start and self.client.exists(name)) else None

    def put(self, key: str, data: Buffer, facts: Facts, deadline: Deadline) -> bool:
        with self._errors():
            args = [data if isinstance(data, memoryview) else bytes(data), time.time(), self.max or 0, self.prefix, key]
            done = int(self.client.eval(PUT, 4, self._name(key), *self._books, *args))
        if done < 0:
            raise TierFull(f"{self.name}: no room for {len(data)} bytes under max={self.max}.")
        return done == 1

    def size(self, key: str, deadline: Deadline) -> int | None:
        with self._errors():
            return self.client.strlen(self._name(key)) or None

    def delete(self, key: str, deadline: Deadline) -> bool:
        with self._errors():
            return bool(self.client.eval(DELETE, 4, self._name(key), *self._books, key))

    def keys(self, deadline: Deadline) -> Iterator[str]:
        with self._errors():
            return iter([key.decode() for key in self.client.hkeys(self._books[1])])

    def stat(self, deadline: Deadline) -> TierStat:
        with self._errors():
            count, nbytes = self.client.hlen(self._books[1]), self.client.get(self._books[2])
        return TierStat(count, int(nbytes or 0), self.max)

    def close(self) -> None:
        self.client.close()
