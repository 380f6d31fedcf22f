"""The commands of a dialogue, such as ``/help``."""

import difflib
import re
from dataclasses import dataclass

EDIT_KEY, RETRY_KEY = "Ctrl-X Ctrl-E", "Alt-R"


@dataclass(frozen=True, slots=True)
class Command:
    """A command.

    Attributes:
        name: without the slash.
        argument: its argument in the help; in brackets if it may be left out.
        about: what it does.
    """

    name: str
    argument: str
    about: str


COMMANDS = {
    command.name: command
    for command in (
        Command("help", "", "show the commands and keys"),
        Command("model", "[NAME]", "choose the model; - is the server's own"),
        Command("system", "[TEXT]", "set the system prompt; - removes it"),
        Command("retry", "", f"send the last prompt again and replace its reply ({RETRY_KEY})"),
        Command("edit", "[TEXT]", f"write the prompt in $VISUAL or $EDITOR ({EDIT_KEY})"),
        Command("save", "FILE", "save as Markdown, or as JSON if FILE is *.json"),
        Command("save!", "FILE", "the same, over a file that exists"),
        Command("list", "", "list the last conversations"),
        Command("open", "NUMBER", "open a conversation of the list, or one by its id"),
        Command("new", "", "begin a new conversation"),
        Command("exit", "", "leave (Ctrl-D)"),
    )
}
OTHERS = {"bye": "exit", "quit": "exit", "q": "exit", "clear": "new", "reset": "new"}  # elsewhere
KEYS = (
    ("Enter", "sends; during a reply the prompt waits for its end"),
    ("Alt-Enter", "begins a new line"),
    ("Ctrl-C", "stops the reply; without one, clears the line, then leaves"),
    ("Tab", "completes a command"),
    ("Up", "takes back a prompt that waits; else recalls earlier ones"),
)


class CommandError(Exception):
    """A command is unknown, or its argument is not usable. The text says so to the user."""


def parse(text: str) -> tuple[str, str] | None:
    """Return the name and the argument of a command; None if the text is a prompt.

    ``/etc/passwd`` is a prompt, and so is a text that begins with a space.

    Raises:
        CommandError: there is no such command, or its argument is missing.
    """
    match = re.fullmatch(r"/([^\s/]+)(?:\s+(.*))?", text.rstrip(), re.DOTALL)
    if match is None:
        return None
    name, argument = match[1].lower(), (match[2] or "").strip()
    command = COMMANDS.get(name)
    if command is None:
        near = [OTHERS[name]] if name in OTHERS else difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean /{near[0]}? " if near else ""
        raise CommandError(
            f"there is no command /{name}; {hint}/help lists the commands; a space before "
            "the text sends it as a prompt"
        )
    if command.argument and not argument and not command.argument.startswith("["):
        raise CommandError(f"/{name} {command.argument}: the argument is missing")
    if argument and not command.argument:
        raise CommandError(f"/{name} has no argument")
    return name, argument


def help_lines() -> list[str]:
    """Return the lines of ``/help``."""
    commands = [(f"/{c.name} {c.argument}", c.about) for c in COMMANDS.values()]
    return [f"  {name:16} {about}" for name, about in (*commands, *KEYS)]
