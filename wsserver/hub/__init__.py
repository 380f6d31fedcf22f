"""The hub: the generations of this process, from the prompt that starts one to its last save.

=================  ========================================================================
``hub``            the entry point: prompt, find, follow, stop, delete, drain
``live``           generations and conversations in memory, as data
``scheduling``     accepts prompts, and starts each when its conversation is free
``running``        runs one generation: model, time limits, end
``context``        selects the turns that the model gets
``intake``         appends the pieces of the model to the log
``endings``        the terminal of a generation
``journal``        saves the logs while they grow
``retention``      finds generations by id: live, ended, stored
``conversations``  conversations in memory and in the store
``titles``         titles of conversations, written by a model
``accounts``       the limits of principals, where they need the store or other nodes
``tally``          what principals use, and their limits on prompts
``quota``          limits on what principals may keep in the store
``upkeep``         deletes what has expired
``reporting``      metrics and log events of generations
``elsewhere``      the other nodes, as an interface that ``cluster`` implements
=================  ========================================================================
"""
