"""The other nodes of a cluster, as the parts of this server see them."""

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from wsserver.hub.live import Conversation, Generation, Watcher
from wsserver.limits import Account
from wsserver.protocol import Prompt
from wsserver.stores.base import Used


class Moved(Exception):
    """Another node has the conversation by now."""


class Leaving(Exception):
    """The node that has the conversation takes no more prompts. It leaves soon."""


class Running(Exception):
    """Another node runs the generation already.

    Args:
        node: the id of the node.
    """

    def __init__(self, node: str) -> None:
        super().__init__(node)
        self.node = node


class Use(Protocol):
    """What an owner and an account use on all nodes, while no other node can change it."""

    used: Used

    def reserve(self, generation: Generation, prompts: list[float]) -> None:
        """Count a generation that was accepted.

        Args:
            generation: the generation, with its highest cost.
            prompts: the prompts that each key of the account has left.
        """
        ...


class Elsewhere(Protocol):
    """The other nodes; see :class:`wsserver.cluster.cluster.Cluster`."""

    async def claim(self, conversation: Conversation) -> str | None:
        """Lease a conversation; return the id of the node that has it, None if it is this one."""
        ...

    def holds(self, conversation: Conversation) -> bool:
        """Whether this node leases a conversation now."""
        ...

    async def prompt(
        self,
        node: str,
        prompt: Prompt,
        conversation: Conversation,
        account: Account,
        sender: Watcher | None,
    ) -> Generation:
        """Send a prompt to the node that has its conversation, and follow the reply."""
        ...

    async def find(self, owner: str, name: str, node: str | None) -> Generation | None:
        """Follow a generation that runs on another node; return None if it does not run there.

        Args:
            owner: the owner of the generation.
            name: its id.
            node: the id of the node; None to find out which one runs it.
        """
        ...

    async def unstored(self, owner: str, name: str) -> Generation | None:
        """Follow the reply to a chat that the store does not know; return None if none runs.

        Raises:
            Refused: no node has it, and a node does not answer.
        """
        ...

    async def stop(self, generation: Generation) -> None:
        """Stop a generation of another node, and wait until its request is closed."""
        ...

    def forget(self, generation: Generation, *, lost: bool, grace: float | None) -> None:
        """Forget a mirror that no client follows any more.

        Args:
            generation: the generation.
            lost: the last client may not have noticed yet that its connection died.
            grace: seconds in which the clients can come back; None for the setting.
        """
        ...

    async def resuming(self, owner: str, name: str) -> None:
        """Tell the other nodes that the page of a chat asks for its reply after a reload.

        The message is sent when this returns: the next request of the page may go elsewhere.
        """
        ...

    async def learn(self, conversation: Conversation) -> bool:
        """Follow what another node runs in a conversation now.

        Returns:
            Whether that node has replies that it could not save yet.
        """
        ...

    async def watch(self, conversation: Conversation) -> None:
        """Follow what another node runs in a conversation, now and later."""
        ...

    def use(self, owner: str, account: Account, name: str) -> AbstractAsyncContextManager[Use]:
        """Return what an owner and an account use, for the decision on a prompt.

        Args:
            owner: the owner of the prompt.
            account: the account whose limits apply.
            name: the id of the generation.
        """
        ...

    def unreserve(self, generation: Generation) -> None:
        """Count a generation no longer: its end cannot be saved."""
        ...

    def started(self, generation: Generation) -> None:
        """Tell the other nodes of a generation that this node has accepted."""
        ...

    def renamed(self, owner: str, name: str, title: str) -> None:
        """Tell the other nodes of the new title of a conversation."""
        ...

    async def delete(self, node: str, conversation: Conversation) -> None:
        """Let the node that has a conversation delete it."""
        ...

    def deleted(self, conversation: Conversation) -> None:
        """Tell the other nodes that a conversation was deleted."""
        ...
