-- A SQLite store of schema 6, as the version before content blocks left it.
PRAGMA user_version = 6;
BEGIN TRANSACTION;
CREATE TABLE "conversation" (
        owner TEXT NOT NULL,
        id TEXT NOT NULL,
        title TEXT NOT NULL,
        created REAL NOT NULL,
        updated REAL NOT NULL,
        place INTEGER NOT NULL, -- in the order of use; the one used last has the largest
        PRIMARY KEY (owner, id),
        UNIQUE (owner, place)
    ) WITHOUT ROWID;
INSERT INTO "conversation" VALUES('ann','conversation-one','Was ist das? ☃',1795805396.32749,1.79580539633027148243e+09,11);
INSERT INTO "conversation" VALUES('ann','conversation-two','Hello?',1.79580539633005905157e+09,1.79580539633005905157e+09,10);
CREATE TABLE counted (
        owner TEXT NOT NULL,
        id TEXT NOT NULL,
        began REAL NOT NULL,
        day INTEGER NOT NULL,
        tokens INTEGER NOT NULL, microdollars INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (owner, id, began)
    ) WITHOUT ROWID;
INSERT INTO "counted" VALUES('ann','failed-generation',1790000000.25,20784,10,54);
INSERT INTO "counted" VALUES('ann','other-generation',1790000000.25,20784,27,189);
INSERT INTO "counted" VALUES('ann','outside-generation',1790000000.25,20784,27,189);
INSERT INTO "counted" VALUES('ann','replaced-generation',1790000000.25,20784,27,189);
INSERT INTO "counted" VALUES('ann','replacing-generation',1790000000.25,20784,27,189);
INSERT INTO "counted" VALUES('ann','stopped-generation',1790000000.25,20784,10,54);
INSERT INTO "counted" VALUES('ann','thinking-generation',1790000000.25,20784,27,189);
INSERT INTO "counted" VALUES('ann','unsaid-generation',1790000000.25,20784,0,0);
INSERT INTO "counted" VALUES('ann','whole-generation',1790000000.25,20784,27,189);
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
CREATE TABLE "generation" (
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
INSERT INTO "generation" VALUES(1,'ann','whole-generation',1790000000.25,1795805396.32749,'conversation-one',1,NULL,NULL,197,511,'claude-sonnet-4-6','{"type":"done","id":"whole-generation","seq":3,"reason":"end_turn","usage":{"input_tokens":8,"output_tokens":9,"cache_read_input_tokens":100}}','{"type":"prompt","prompt":"Was ist das? ☃","id":"whole-generation","conversation":"conversation-one","on_busy":"reject","system":"Be brief.","max_tokens":100,"temperature":0.5}','Ein Schneemann. ☃','[4,12,1]','');
INSERT INTO "generation" VALUES(2,'ann','stopped-generation',1790000000.25,1.79580539632815623283e+09,'conversation-one',2,NULL,NULL,120,516,'claude-sonnet-4-6','{"type":"done","id":"stopped-generation","seq":2,"reason":"stopped","by":"client","usage":{"input_tokens":8,"output_tokens":2,"estimated":true}}','{"type":"prompt","prompt":"Hello?","id":"stopped-generation","conversation":"conversation-one","on_busy":"reject"}','Hi the','[3,3]','');
INSERT INTO "generation" VALUES(3,'ann','failed-generation',1790000000.25,1.79580539632847499846e+09,'conversation-one',3,NULL,NULL,117,575,'claude-sonnet-4-6','{"type":"error","code":"overloaded","message":"The model''s API is overloaded.","id":"failed-generation","seq":1,"retryable":true,"usage":{"input_tokens":8,"output_tokens":2,"estimated":true},"ref":"0badcafe"}','{"type":"prompt","prompt":"Hello?","id":"failed-generation","conversation":"conversation-one","on_busy":"reject"}','Half','[4]','');
INSERT INTO "generation" VALUES(4,'ann','replaced-generation',1790000000.25,1.79580539632871937754e+09,'conversation-one',4,'replaced',NULL,121,518,'claude-sonnet-4-6','{"type":"done","id":"replaced-generation","seq":1,"reason":"end_turn","usage":{"input_tokens":8,"output_tokens":9,"cache_read_input_tokens":100}}','{"type":"prompt","prompt":"Hello?","id":"replaced-generation","conversation":"conversation-one","on_busy":"reject"}','Wrong.','[6]','');
INSERT INTO "generation" VALUES(5,'ann','replacing-generation',1790000000.25,1.79580539632895588874e+09,'conversation-one',5,NULL,'replaced-generation',155,540,'claude-sonnet-4-6','{"type":"done","id":"replacing-generation","seq":3,"reason":"end_turn","usage":{"input_tokens":8,"output_tokens":9,"cache_read_input_tokens":100}}','{"type":"prompt","prompt":"Hello?","id":"replacing-generation","conversation":"conversation-one","on_busy":"reject","retry_of":"replaced-generation"}','Right.','[-5,-9,6]','Hm, better: ');
INSERT INTO "generation" VALUES(6,'ann','unsaid-generation',1790000000.25,1.7958053963292472362e+09,'conversation-one',6,'unsaid',NULL,113,492,'claude-sonnet-4-6','{"type":"done","id":"unsaid-generation","seq":0,"reason":"stopped","by":"client","usage":{"input_tokens":0,"output_tokens":0}}','{"type":"prompt","prompt":"Hello?","id":"unsaid-generation","conversation":"conversation-one","on_busy":"reject"}','','[]','');
INSERT INTO "generation" VALUES(7,'ann','thinking-generation',1790000000.25,1.79580539632960796362e+09,'conversation-one',7,NULL,NULL,125,538,'claude-sonnet-4-6','{"type":"done","id":"thinking-generation","seq":4,"reason":"end_turn","usage":{"input_tokens":8,"output_tokens":9,"cache_read_input_tokens":100}}','{"type":"prompt","prompt":"Hello?","id":"thinking-generation","conversation":"conversation-one","on_busy":"reject"}','Two. Four.','[-6,5,-8,5]','One. Three. ');
INSERT INTO "generation" VALUES(8,'ann','outside-generation',1790000000.25,1.79580539632983779904e+09,NULL,NULL,NULL,NULL,186,476,'claude-sonnet-4-6','{"type":"done","id":"outside-generation","seq":3,"reason":"end_turn","usage":{"input_tokens":8,"output_tokens":9,"cache_read_input_tokens":100}}','{"type":"prompt","messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello"},{"role":"user","content":"Who?"}],"id":"outside-generation","on_busy":"reject"}','A model.','[2,-6,6]','model');
INSERT INTO "generation" VALUES(9,'ann','other-generation',1790000000.25,1.79580539633005905157e+09,'conversation-two',1,NULL,NULL,118,506,'claude-sonnet-4-6','{"type":"done","id":"other-generation","seq":1,"reason":"end_turn","usage":{"input_tokens":8,"output_tokens":9,"cache_read_input_tokens":100}}','{"type":"prompt","prompt":"Hello?","id":"other-generation","conversation":"conversation-two","on_busy":"reject"}','Other.','[6]','');
INSERT INTO "generation" VALUES(10,'ann','running-generation',1790000000.25,NULL,'conversation-one',8,NULL,NULL,114,367,'claude-sonnet-4-6',NULL,'{"type":"prompt","prompt":"Hello?","id":"running-generation","conversation":"conversation-one","on_busy":"reject"}',NULL,NULL,NULL);
CREATE TABLE held (
        owner TEXT PRIMARY KEY,
        bytes INTEGER NOT NULL,
        conversations INTEGER NOT NULL
    ) WITHOUT ROWID;
INSERT INTO "held" VALUES('ann',6405,2);
CREATE TABLE piece (
        generation INTEGER NOT NULL REFERENCES generation (number) ON DELETE CASCADE,
        after INTEGER NOT NULL,
        texts TEXT NOT NULL,
        PRIMARY KEY (generation, after)
    ) WITHOUT ROWID;
INSERT INTO "piece" VALUES(10,0,'["So ", ["far "], ["not "]]');
INSERT INTO "piece" VALUES(10,3,'["done"]');
CREATE TABLE spent (
        owner TEXT NOT NULL,
        day INTEGER NOT NULL,
        tokens INTEGER NOT NULL, microdollars INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (owner, day)
    ) WITHOUT ROWID;
INSERT INTO "spent" VALUES('ann',20784,182,1242);
CREATE INDEX spent_by_day ON spent (day);
CREATE INDEX counted_by_day ON counted (day);
CREATE INDEX generation_loose ON generation (ended, number) WHERE lengths IS NULL;
CREATE INDEX generation_outside ON generation (ended) WHERE conversation IS NULL;
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
CREATE INDEX forgotten_by_owner ON forgotten (owner, at);
CREATE INDEX forgotten_by_time ON forgotten (at);
CREATE TRIGGER spend AFTER INSERT ON counted BEGIN
        INSERT INTO spent VALUES (new.owner, new.day, new.tokens, new.microdollars)
        ON CONFLICT (owner, day) DO UPDATE SET
            tokens = tokens + excluded.tokens, microdollars = microdollars + excluded.microdollars;
    END;
CREATE INDEX generation_shown ON generation (owner, conversation, turn) WHERE hidden IS NULL;
COMMIT;
