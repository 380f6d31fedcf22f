"""The tables of a SQLite file, as steps that migrate the file from one version to the next.

A released step is never changed, because existing files have run it.
"""

# The step at index N migrates a file from version N to version N + 1.
MIGRATIONS = [
    """
    CREATE TABLE conversation (
        id TEXT PRIMARY KEY,
        owner TEXT NOT NULL,
        title TEXT NOT NULL,
        created REAL NOT NULL,
        updated REAL NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX conversation_by_owner ON conversation (owner, updated, id);
    CREATE TABLE generation (
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL,
        began REAL NOT NULL,
        ended REAL,
        owner TEXT NOT NULL,
        conversation TEXT REFERENCES conversation (id) ON DELETE CASCADE,
        prompt TEXT NOT NULL,
        model TEXT NOT NULL,
        terminal TEXT,
        text TEXT, -- all of its text, once it has ended
        UNIQUE (owner, id, began)
    );
    CREATE INDEX generation_by_conversation ON generation (conversation, number);
    CREATE TABLE piece (
        generation INTEGER NOT NULL REFERENCES generation (number) ON DELETE CASCADE,
        after INTEGER NOT NULL,
        texts TEXT NOT NULL,
        PRIMARY KEY (generation, after)
    ) WITHOUT ROWID;
    """,
    """
    CREATE TABLE spent (
        owner TEXT NOT NULL,
        day INTEGER NOT NULL,
        tokens INTEGER NOT NULL,
        PRIMARY KEY (owner, day)
    ) WITHOUT ROWID;
    CREATE INDEX spent_by_day ON spent (day);
    -- The generations whose cost is in `spent`, deleted ones included. A row is kept while the end
    -- of its generation may be saved again.
    CREATE TABLE counted (
        owner TEXT NOT NULL,
        id TEXT NOT NULL,
        began REAL NOT NULL,
        day INTEGER NOT NULL,
        tokens INTEGER NOT NULL,
        PRIMARY KEY (owner, id, began)
    ) WITHOUT ROWID;
    CREATE INDEX counted_by_day ON counted (day);
    CREATE TRIGGER spend AFTER INSERT ON counted BEGIN
        INSERT INTO spent VALUES (new.owner, new.day, new.tokens)
        ON CONFLICT (owner, day) DO UPDATE SET tokens = tokens + excluded.tokens;
    END;
    CREATE INDEX generation_without_end ON generation (ended) WHERE ended IS NULL;
    """,
    """
    CREATE TABLE new_conversation (
        owner TEXT NOT NULL,
        id TEXT NOT NULL,
        title TEXT NOT NULL,
        created REAL NOT NULL,
        updated REAL NOT NULL,
        PRIMARY KEY (owner, id)
    ) WITHOUT ROWID;
    INSERT INTO new_conversation SELECT owner, id, title, created, updated FROM conversation;
    -- Another owner may have generations in a conversation. They get a conversation of their own.
    INSERT INTO new_conversation
        SELECT owner, conversation, '…', min(began), max(coalesce(ended, began)) FROM generation
        WHERE conversation IS NOT NULL GROUP BY owner, conversation
        ON CONFLICT (owner, id) DO NOTHING;
    CREATE TABLE new_generation (
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL,
        began REAL NOT NULL,
        ended REAL,
        owner TEXT NOT NULL,
        conversation TEXT,
        turn INTEGER, -- its number in the conversation, from 1
        prompt TEXT NOT NULL,
        model TEXT NOT NULL,
        terminal TEXT,
        text TEXT, -- all of its text, once it has ended
        UNIQUE (owner, id, began),
        UNIQUE (owner, conversation, turn),
        FOREIGN KEY (owner, conversation) REFERENCES conversation (owner, id) ON DELETE CASCADE
    );
    INSERT INTO new_generation
        SELECT number, id, began, ended, owner, conversation, CASE WHEN conversation IS NOT NULL
        THEN row_number() OVER (PARTITION BY owner, conversation ORDER BY number) END,
        prompt, model, terminal, text FROM generation;
    DROP TABLE generation;
    DROP TABLE conversation;
    ALTER TABLE new_conversation RENAME TO conversation;
    ALTER TABLE new_generation RENAME TO generation;
    CREATE INDEX conversation_by_owner ON conversation (owner, updated, id);
    CREATE INDEX generation_without_end ON generation (ended) WHERE ended IS NULL;
    CREATE INDEX generation_outside ON generation (ended) WHERE conversation IS NULL;
    """,
    """
    CREATE TABLE new_conversation (
        owner TEXT NOT NULL,
        id TEXT NOT NULL,
        title TEXT NOT NULL,
        created REAL NOT NULL,
        updated REAL NOT NULL,
        place INTEGER NOT NULL, -- in the order of use; the one used last has the largest
        PRIMARY KEY (owner, id),
        UNIQUE (owner, place)
    ) WITHOUT ROWID;
    INSERT INTO new_conversation SELECT owner, id, title, created, updated,
        row_number() OVER (PARTITION BY owner ORDER BY updated, id) FROM conversation;
    -- Small columns come first: SQLite reads a row from its beginning, and no further than asked.
    CREATE TABLE new_generation (
        number INTEGER PRIMARY KEY,
        owner TEXT NOT NULL,
        id TEXT NOT NULL,
        began REAL NOT NULL,
        ended REAL,
        conversation TEXT,
        turn INTEGER, -- its number in the conversation, from 1
        hidden TEXT, -- why it is not in the history: replaced, unsaid
        retry_of TEXT,
        size INTEGER NOT NULL, -- bytes of prompt and text
        rest INTEGER NOT NULL, -- bytes of everything else
        model TEXT NOT NULL,
        terminal TEXT,
        prompt TEXT NOT NULL,
        text TEXT, -- the pieces of an ended generation: text, lengths and thinking
        lengths TEXT,
        thinking TEXT,
        UNIQUE (owner, id, began),
        UNIQUE (owner, conversation, turn),
        FOREIGN KEY (owner, conversation) REFERENCES conversation (owner, id) ON DELETE CASCADE
    );
    INSERT INTO new_generation
        SELECT number, owner, id, began, ended, conversation, turn, NULL, NULL,
        length(CAST(prompt AS BLOB)) + coalesce(length(CAST(text AS BLOB)), 0),
        256 + coalesce(length(terminal), 0), model, terminal, prompt, text, NULL, NULL
        FROM generation;
    DROP TABLE generation;
    DROP TABLE conversation;
    ALTER TABLE new_conversation RENAME TO conversation;
    ALTER TABLE new_generation RENAME TO generation;
    CREATE INDEX generation_loose ON generation (ended, number) WHERE lengths IS NULL;
    CREATE INDEX generation_outside ON generation (ended) WHERE conversation IS NULL;
    -- What each owner has here; the triggers below keep it true.
    CREATE TABLE held (
        owner TEXT PRIMARY KEY,
        bytes INTEGER NOT NULL,
        conversations INTEGER NOT NULL
    ) WITHOUT ROWID;
    INSERT INTO held SELECT owner, sum(size + rest), 0 FROM generation GROUP BY owner;
    INSERT INTO held SELECT owner, 0, count(*) FROM conversation WHERE TRUE GROUP BY owner
        ON CONFLICT (owner) DO UPDATE SET conversations = excluded.conversations;
    CREATE TRIGGER generation_added AFTER INSERT ON generation BEGIN
        INSERT INTO held VALUES (new.owner, new.size + new.rest, 0)
        ON CONFLICT (owner) DO UPDATE SET bytes = bytes + excluded.bytes;
    END;
    CREATE TRIGGER generation_grown AFTER UPDATE OF size, rest ON generation BEGIN
        UPDATE held SET bytes = bytes + new.size + new.rest - old.size - old.rest
        WHERE owner = new.owner;
    END;
    CREATE TRIGGER generation_deleted AFTER DELETE ON generation BEGIN
        UPDATE held SET bytes = bytes - old.size - old.rest WHERE owner = old.owner;
    END;
    CREATE TRIGGER conversation_added AFTER INSERT ON conversation BEGIN
        INSERT INTO held VALUES (new.owner, 0, 1)
        ON CONFLICT (owner) DO UPDATE SET conversations = conversations + 1;
    END;
    CREATE TRIGGER conversation_deleted AFTER DELETE ON conversation BEGIN
        UPDATE held SET conversations = conversations - 1 WHERE owner = old.owner;
    END;
    CREATE INDEX conversation_by_time ON conversation (updated);
    -- Conversations whose generations are being deleted, step by step.
    CREATE TABLE deleting (
        owner TEXT NOT NULL,
        id TEXT NOT NULL,
        PRIMARY KEY (owner, id),
        FOREIGN KEY (owner, id) REFERENCES conversation (owner, id) ON DELETE CASCADE
    ) WITHOUT ROWID;
    CREATE TABLE forgotten (
        owner TEXT NOT NULL,
        id TEXT NOT NULL,
        at REAL NOT NULL,
        PRIMARY KEY (owner, id)
    ) WITHOUT ROWID;
    CREATE INDEX forgotten_by_owner ON forgotten (owner, at);
    CREATE INDEX forgotten_by_time ON forgotten (at);
    """,
    """
    ALTER TABLE spent ADD COLUMN microdollars INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE counted ADD COLUMN microdollars INTEGER NOT NULL DEFAULT 0;
    DROP TRIGGER spend;
    CREATE TRIGGER spend AFTER INSERT ON counted BEGIN
        INSERT INTO spent VALUES (new.owner, new.day, new.tokens, new.microdollars)
        ON CONFLICT (owner, day) DO UPDATE SET
            tokens = tokens + excluded.tokens, microdollars = microdollars + excluded.microdollars;
    END;
    """,
    """
    -- A history is read without reading the turns that are hidden.
    CREATE INDEX generation_shown ON generation (owner, conversation, turn) WHERE hidden IS NULL;
    """,
    """
    -- The kinds and blocks of the pieces. NULL for text and thinking only: the sign of a number in
    -- `lengths` is then the kind. `thinking` has the data of all pieces other than text.
    ALTER TABLE generation ADD COLUMN runs TEXT;
    -- A history also has the thinking, so the size of a turn includes it.
    UPDATE generation SET size = size + length(CAST(thinking AS BLOB)),
        rest = rest - length(CAST(thinking AS BLOB)) WHERE thinking <> '';
    """,
]
