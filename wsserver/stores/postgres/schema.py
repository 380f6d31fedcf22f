"""The tables and functions of the store in PostgreSQL, and their migrations.

All names are in one PostgreSQL schema, ``wsserver`` unless the address has another `search_path`.
A text that a client or a model writes may have the character U+0000, which PostgreSQL's `text`
cannot store: such a column is `bytea` with UTF-8. JSON escapes the character, and is `text`.
"""

from typing import Any

from wsserver.errors import ConfigError

OLDEST = 130_000  # PostgreSQL 13, the oldest version that its makers still mended in 2025

MIGRATIONS = [
    """
    CREATE SEQUENCE use; -- grows with each use of a conversation

    CREATE TABLE conversation (
        owner text COLLATE "C" NOT NULL,
        id text COLLATE "C" NOT NULL,
        title bytea NOT NULL,
        created float8 NOT NULL, -- times are in seconds since 1970
        updated float8 NOT NULL,
        place bigint NOT NULL DEFAULT nextval('use'), -- the one used last has the largest
        PRIMARY KEY (owner, id)
    );
    CREATE UNIQUE INDEX conversation_by_place ON conversation (owner, place);
    CREATE INDEX conversation_by_time ON conversation (updated);

    CREATE TABLE generation (
        number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        owner text COLLATE "C" NOT NULL,
        id text COLLATE "C" NOT NULL,
        began float8 NOT NULL,
        ended float8,
        conversation text COLLATE "C",
        turn bigint, -- its number in the conversation, from 1
        hidden text, -- why it is not in the history: replaced, unsaid
        retry_of text,
        node text COLLATE "C", -- the node that runs it, or has run it
        size bigint NOT NULL, -- bytes of the prompt and of the content
        rest bigint NOT NULL, -- bytes of everything else
        model text NOT NULL,
        prompt text NOT NULL, -- JSON
        terminal text, -- JSON
        text bytea, -- the pieces of an ended generation; see Packed
        other bytea,
        lengths text, -- JSON
        runs text, -- JSON
        UNIQUE (owner, id, began),
        UNIQUE (owner, conversation, turn),
        FOREIGN KEY (owner, conversation) REFERENCES conversation (owner, id) ON DELETE CASCADE
    );
    CREATE INDEX generation_shown ON generation (owner, conversation, turn) WHERE hidden IS NULL;
    CREATE INDEX generation_running ON generation (number) WHERE ended IS NULL;
    CREATE INDEX generation_outside ON generation (ended) WHERE conversation IS NULL;

    CREATE TABLE node ( -- the nodes of a cluster, each from its start to its end
        id text COLLATE "C" PRIMARY KEY,
        expires timestamptz NOT NULL, -- by the clock of the database
        dead boolean NOT NULL DEFAULT false -- it did not renew; the others end its replies
    );
    CREATE TABLE lease ( -- the node that decides on a conversation in use
        owner text COLLATE "C" NOT NULL,
        conversation text COLLATE "C" NOT NULL,
        node text COLLATE "C" NOT NULL REFERENCES node (id) ON DELETE CASCADE,
        PRIMARY KEY (owner, conversation)
    );
    CREATE INDEX lease_by_node ON lease (node);

    -- Whether a node may write, and keeps that right until the end of the transaction.
    CREATE FUNCTION may_write(_node text) RETURNS boolean LANGUAGE sql AS $$
        SELECT _node IS NULL
            OR EXISTS (SELECT FROM node WHERE id = _node AND NOT dead FOR KEY SHARE)
    $$;

    -- Leases a conversation, and returns the node that has it then; NULL if the node may not write.
    CREATE FUNCTION claim(_owner text, _conversation text, _node text) RETURNS text
    LANGUAGE plpgsql AS $$
    DECLARE
        _holder text;
    BEGIN
        IF NOT may_write(_node) THEN
            RETURN NULL;
        END IF;
        LOOP
            INSERT INTO lease VALUES (_owner, _conversation, _node) ON CONFLICT DO NOTHING;
            IF FOUND THEN
                RETURN _node;
            END IF;
            SELECT node INTO _holder FROM lease
            WHERE owner = _owner AND conversation = _conversation;
            IF FOUND THEN
                RETURN _holder;
            END IF; -- it was released just now
        END LOOP;
    END $$;

    CREATE TABLE piece ( -- the pieces of a generation that has not ended, as JSON
        generation bigint NOT NULL REFERENCES generation (number) ON DELETE CASCADE,
        after int NOT NULL, -- the number of pieces before these
        batch text NOT NULL,
        PRIMARY KEY (generation, after)
    );

    CREATE TABLE forgotten ( -- the traces of deleted generations
        owner text COLLATE "C" NOT NULL,
        id text COLLATE "C" NOT NULL,
        at float8 NOT NULL,
        PRIMARY KEY (owner, id)
    );
    CREATE INDEX forgotten_by_owner ON forgotten (owner, at);
    CREATE INDEX forgotten_by_time ON forgotten (at);

    CREATE TABLE counted ( -- the replies of the last days whose cost is in `spent`
        owner text COLLATE "C" NOT NULL,
        id text COLLATE "C" NOT NULL,
        began float8 NOT NULL,
        day int NOT NULL, -- since 1970
        PRIMARY KEY (owner, id, began)
    );
    CREATE INDEX counted_by_day ON counted (day);

    CREATE TABLE spent (
        owner text COLLATE "C" NOT NULL,
        day int NOT NULL,
        tokens bigint NOT NULL,
        microdollars bigint NOT NULL,
        PRIMARY KEY (owner, day)
    );
    CREATE INDEX spent_by_day ON spent (day);

    CREATE TABLE held ( -- what each owner has here; the triggers below keep it true
        owner text COLLATE "C" PRIMARY KEY,
        bytes bigint NOT NULL,
        conversations bigint NOT NULL
    );
    CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
        more_bytes bigint := 0;
        more_conversations bigint := 0;
        whose text;
    BEGIN
        IF TG_TABLE_NAME = 'conversation' THEN
            more_conversations := CASE TG_OP WHEN 'INSERT' THEN 1 ELSE -1 END;
        ELSIF TG_OP = 'INSERT' THEN
            more_bytes := new.size + new.rest;
        ELSIF TG_OP = 'UPDATE' THEN
            more_bytes := new.size + new.rest - old.size - old.rest;
        ELSE
            more_bytes := -old.size - old.rest;
        END IF;
        whose := CASE TG_OP WHEN 'DELETE' THEN old.owner ELSE new.owner END;
        INSERT INTO held VALUES (whose, more_bytes, more_conversations)
        ON CONFLICT (owner) DO UPDATE SET bytes = held.bytes + excluded.bytes,
            conversations = held.conversations + excluded.conversations;
        RETURN NULL;
    END $$;
    CREATE TRIGGER held AFTER INSERT OR DELETE OR UPDATE OF size, rest ON generation
        FOR EACH ROW EXECUTE FUNCTION hold();
    CREATE TRIGGER held AFTER INSERT OR DELETE ON conversation
        FOR EACH ROW EXECUTE FUNCTION hold();

    CREATE FUNCTION spend( -- counts the cost of a reply once
        _owner text, _id text, _began float8, _day int, _tokens bigint, _microdollars bigint
    ) RETURNS void LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO counted VALUES (_owner, _id, _began, _day) ON CONFLICT DO NOTHING;
        IF FOUND THEN
            INSERT INTO spent VALUES (_owner, _day, _tokens, _microdollars)
            ON CONFLICT (owner, day) DO UPDATE SET tokens = spent.tokens + excluded.tokens,
                microdollars = spent.microdollars + excluded.microdollars;
        END IF;
    END $$;

    CREATE FUNCTION save( -- an entry; see Entry in Python
        _owner text, _id text, _began float8, _conversation text, _retry_of text, _model text,
        _title bytea, _prompt text, _keys int, -- NULL unless the generation may be new
        _after int, _batch text, -- some of the pieces of a generation that runs
        _text bytea, _other bytea, _lengths text, _runs text, -- all pieces of one that has ended
        _terminal text, _tokens bigint, _microdollars bigint, _withdrawn boolean,
        _now float8, _day int, _node text
    ) RETURNS void LANGUAGE plpgsql AS $$
    DECLARE
        _number bigint;
        _ended boolean;
    BEGIN
        IF _terminal IS NOT NULL THEN
            PERFORM spend(_owner, _id, _began, _day, _tokens, _microdollars);
        END IF;
        IF _prompt IS NOT NULL AND _conversation IS NOT NULL THEN
            INSERT INTO conversation VALUES (_owner, _conversation, _title, _now, _now)
            ON CONFLICT (owner, id) DO UPDATE SET place = excluded.place,
                updated = greatest(conversation.updated, excluded.updated);
        ELSIF _terminal IS NOT NULL AND _conversation IS NOT NULL THEN
            UPDATE conversation SET updated = greatest(updated, _now), place = nextval('use')
            WHERE owner = _owner AND id = _conversation;
        END IF;
        IF _prompt IS NOT NULL THEN
            INSERT INTO generation
                (owner, id, began, conversation, turn, retry_of, node, size, rest, model, prompt)
            VALUES (
                _owner, _id, _began, _conversation,
                CASE WHEN _conversation IS NOT NULL THEN (
                    SELECT coalesce(max(turn), 0) + 1 FROM generation
                    WHERE owner = _owner AND conversation = _conversation
                ) END,
                _retry_of, _node, octet_length(_prompt), _keys, _model, _prompt
            )
            ON CONFLICT (owner, id, began) DO NOTHING RETURNING number INTO _number;
            IF _number IS NOT NULL AND _retry_of IS NOT NULL THEN
                UPDATE generation SET hidden = 'replaced' WHERE owner = _owner AND id = _retry_of
                AND conversation = _conversation AND number <> _number AND hidden IS NULL;
            END IF;
        END IF;
        SELECT number, terminal IS NOT NULL INTO _number, _ended FROM generation
        WHERE owner = _owner AND id = _id AND began = _began FOR UPDATE;
        IF _number IS NULL OR _ended THEN -- it was deleted, or its end is saved
            RETURN;
        END IF;
        IF _batch IS NOT NULL THEN
            INSERT INTO piece VALUES (_number, _after, _batch)
            ON CONFLICT (generation, after) DO UPDATE SET batch = excluded.batch
            WHERE length(excluded.batch) > length(piece.batch);
        END IF;
        IF _terminal IS NOT NULL THEN
            UPDATE generation SET text = _text, other = _other, lengths = _lengths, runs = _runs,
                terminal = _terminal, ended = _now,
                hidden = CASE WHEN _withdrawn THEN 'unsaid' ELSE hidden END,
                size = size + octet_length(_text) + octet_length(_other),
                rest = rest + length(_lengths) + length(_runs) + octet_length(_terminal)
            WHERE number = _number;
            DELETE FROM piece WHERE generation = _number;
            IF _withdrawn AND _retry_of IS NOT NULL THEN
                UPDATE generation SET hidden = NULL WHERE owner = _owner AND id = _retry_of
                AND conversation = _conversation AND hidden = 'replaced';
            END IF;
        END IF;
    END $$;
    """,
    """
    CREATE TABLE reserved ( -- the replies of nodes that have not ended, with their highest cost
        owner text COLLATE "C" NOT NULL,
        id text COLLATE "C" NOT NULL,
        node text COLLATE "C" NOT NULL REFERENCES node (id) ON DELETE CASCADE,
        tokens bigint NOT NULL,
        microdollars bigint NOT NULL,
        PRIMARY KEY (owner, id)
    );
    CREATE INDEX reserved_by_node ON reserved (node);
    CREATE TABLE share ( -- the keys of the accounts that have them
        key text COLLATE "C" NOT NULL,
        owner text COLLATE "C" NOT NULL,
        id text COLLATE "C" NOT NULL,
        PRIMARY KEY (key, owner, id),
        FOREIGN KEY (owner, id) REFERENCES reserved ON DELETE CASCADE
    );
    CREATE INDEX share_by_reply ON share (owner, id);
    CREATE TABLE allowed ( -- the prompts that a key has left, and when it had them
        key text COLLATE "C" PRIMARY KEY,
        prompts float8 NOT NULL,
        at float8 NOT NULL
    );
    CREATE INDEX allowed_by_time ON allowed (at);

    -- Returns what an owner and an account use. Until the end of the transaction no other node can
    -- decide on a prompt of theirs.
    CREATE FUNCTION used(
        _owner text, _id text, _keys text[],
        OUT now float8, OUT node text, OUT held bigint[], OUT prompts float8[], OUT times float8[],
        OUT tokens bigint, OUT microdollars bigint,
        OUT reserved_tokens bigint, OUT reserved_microdollars bigint
    ) LANGUAGE plpgsql AS $$
    DECLARE
        lock text;
    BEGIN
        FOR lock IN -- in order, so that two transactions cannot wait for each other
            SELECT each FROM unnest(_keys || ('owner ' || _owner)) AS each ORDER BY each COLLATE "C"
        LOOP
            PERFORM pg_advisory_xact_lock(
                hashtext('wsserver use ' || current_schema()), hashtext(lock)
            );
        END LOOP;
        now := extract(epoch FROM clock_timestamp());
        SELECT r.node INTO node FROM reserved AS r WHERE r.owner = _owner AND r.id = _id;
        SELECT array_agg((SELECT count(*) FROM share WHERE share.key = each.key) ORDER BY number),
            array_agg(a.prompts ORDER BY number), array_agg(a.at ORDER BY number)
        INTO held, prompts, times
        FROM unnest(_keys) WITH ORDINALITY AS each(key, number)
        LEFT JOIN allowed AS a ON a.key = each.key;
        SELECT s.tokens, s.microdollars INTO tokens, microdollars
        FROM spent AS s WHERE s.owner = _owner AND s.day = floor(now / 86400);
        SELECT coalesce(sum(r.tokens), 0), coalesce(sum(r.microdollars), 0)
        INTO reserved_tokens, reserved_microdollars FROM reserved AS r WHERE r.owner = _owner;
    END $$;

    CREATE FUNCTION reserve(
        _owner text, _id text, _node text, _tokens bigint, _microdollars bigint,
        _keys text[], _prompts float8[], _now float8
    ) RETURNS void LANGUAGE sql AS $$
        INSERT INTO reserved VALUES (_owner, _id, _node, _tokens, _microdollars);
        INSERT INTO share SELECT key, _owner, _id FROM unnest(_keys) AS key;
        INSERT INTO allowed SELECT key, prompts, _now FROM unnest(_keys, _prompts)
            AS each(key, prompts)
        ON CONFLICT (key) DO UPDATE SET prompts = excluded.prompts, at = excluded.at;
    $$;

    CREATE OR REPLACE FUNCTION spend( -- counts the cost of a reply once
        _owner text, _id text, _began float8, _day int, _tokens bigint, _microdollars bigint
    ) RETURNS void LANGUAGE plpgsql AS $$
    BEGIN
        DELETE FROM reserved WHERE owner = _owner AND id = _id;
        INSERT INTO counted VALUES (_owner, _id, _began, _day) ON CONFLICT DO NOTHING;
        IF FOUND THEN
            INSERT INTO spent VALUES (_owner, _day, _tokens, _microdollars)
            ON CONFLICT (owner, day) DO UPDATE SET tokens = spent.tokens + excluded.tokens,
                microdollars = spent.microdollars + excluded.microdollars;
        END IF;
    END $$;
    """,
]


async def migrate(connection: Any) -> None:
    """Bring the tables to the version of this program. Several servers may do it at once.

    Args:
        connection: a connection of asyncpg whose `search_path` is the schema of the tables.

    Raises:
        ConfigError: the server is too old, or the tables are of a later version.
        asyncpg.PostgresError: a statement failed.
    """
    version = int(await connection.fetchval("SHOW server_version_num"))
    if version < OLDEST:
        raise ConfigError(f"store: PostgreSQL {OLDEST // 10_000} or later is needed")
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock(hashtext('wsserver migration'))")
        schema = await connection.fetchval("SELECT current_setting('search_path')")
        # Even with IF NOT EXISTS, CREATE SCHEMA needs a right that the role may not have.
        if not await connection.fetchval("SELECT to_regnamespace($1) IS NOT NULL", schema):
            await connection.execute(f"CREATE SCHEMA {schema}")
        await connection.execute("CREATE TABLE IF NOT EXISTS version (number int NOT NULL)")
        done = await connection.fetchval("SELECT coalesce(max(number), 0) FROM version")
        if done > len(MIGRATIONS):
            raise ConfigError(
                f"store: the tables in the schema {schema} are of a later version of this program"
            )
        if done < len(MIGRATIONS):
            await connection.execute(
                "".join(MIGRATIONS[done:]) + "DELETE FROM version; "
                f"INSERT INTO version VALUES ({len(MIGRATIONS)})"
            )
