"""Chats as text."""

from typing import Any


def render_chat(messages: list[Any]) -> str | None:
    """The messages of a chat as plain text: `role: content`, with an empty line between them.

    Args:
        messages: objects with the texts `role` and `content`.

    Returns:
        The text; None if a message is something else.
    """
    parts = []
    for message in messages:
        match message:
            case {"role": str(role), "content": str(content)}:
                parts.append(f"{role}: {content}")
            case _:
                return None
    return "\n\n".join(parts)
