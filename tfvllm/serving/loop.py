"""The event loop of the server and of its load generator: uvloop's where it is installed, else asyncio's own."""

import asyncio
import importlib.util
import sys
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run(main)`, on uvloop where the extra [serve] is installed: it takes about half the time a request."""
    if importlib.util.find_spec("uvloop") is None:
        return asyncio.run(main)
    import uvloop

    return uvloop.run(main)


async def within(seconds: float, awaitable: Awaitable[T]) -> T:
    """`asyncio.wait_for(awaitable, seconds)`, without a task of its own for each request where Python can (3.11)."""
    if sys.version_info < (3, 11):
        return await asyncio.wait_for(awaitable, seconds)
    async with asyncio.timeout(seconds):
        return await awaitable
