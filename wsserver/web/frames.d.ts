// The frames of the protocol, of clients and of the server. PROTOCOL.md says what they mean.
// `UPDATE_DOCS=1 pytest tests/test_docs.py` writes this file from the JSON Schema.

import type { AnyBlock, Block } from './blocks.js'

/** A frame that a client may send. JSON Schema cannot express these rules: the last message has the role user; no text has half of a surrogate pair; no object has a key twice; an integer has no fraction, not even `.0`; a frame is within the limits of the server. The server also accepts unknown keys whose value is null. */
export type ClientFrame = Prompt | Stop | Resume | Open | List | Rename | Delete | CloseConversation | Auth | Ping

/** A frame that the server may send. A client ignores unknown types and keys, because a later server may add some. */
export type ServerFrame = Hello | Start | Token | Thinking | BlockPart | Done | ErrorFrame | History | Conversations | Renamed | Deleted | Closed | Stopped | Authenticated | Pong

/** Authenticate a client that cannot set headers, or renew a token before it expires. */
export interface Auth {
  request?: string
  type: 'auth'
  token: string
}

/** End what `open` began: follow only the generations that this socket asked for. */
export interface CloseConversation {
  request?: string
  type: 'close'
  conversation: string
}

/** Stop the generations of a conversation, and delete the conversation. */
export interface Delete {
  request?: string
  type: 'delete'
  conversation: string
}

/** Get the client's conversations, newest first; `before` is the `next` of the last page. */
export interface List {
  request?: string
  type: 'list'
  limit?: number
  before?: string
}

/**
 * Get the history of a conversation, and follow its running and later generations.
 *
 * With `before`, only get the part of the history before that point. `size` limits the bytes
 * of the messages in the answer, for a connection that breaks during large frames.
 */
export interface Open {
  request?: string
  type: 'open'
  conversation: string
  before?: number
  size?: number
}

/** Check the connection; the answer is `pong`. */
export interface Ping {
  request?: string
  type: 'ping'
}

/** Ask for a reply: to `prompt` in a conversation, or to `messages` without one. */
export interface Prompt {
  request?: string
  type?: 'prompt'
  prompt?: string | AnyBlock[]
  messages?: ({
    role: 'user' | 'assistant'
    content: string | AnyBlock[]
  })[]
  id?: string
  conversation?: string
  on_busy?: 'reject' | 'queue' | 'interrupt'
  retry_of?: string
  model?: string
  system?: string
  max_tokens?: number
  temperature?: number
}

/** Change the title of a conversation. */
export interface Rename {
  request?: string
  type: 'rename'
  conversation: string
  title: string
}

/** Follow the generation `id` again, beginning with the piece after `after`. */
export interface Resume {
  request?: string
  type: 'resume'
  id: string
  after?: number
}

/** Stop the generation `id`; without `id`, all generations that the socket follows. */
export interface Stop {
  request?: string
  type: 'stop'
  id?: string
}

/**
 * The answer to `auth`: the principal, and when the token expires.
 *
 * `expires` is in seconds since 1970, `expires_in` in seconds from now, for a client whose
 * clock may be wrong. `models`: the models that a prompt can choose, the default first.
 */
export interface Authenticated {
  type: 'authenticated'
  request?: string
  principal: string
  models: string[]
  expires?: number
  expires_in?: number
}

/**
 * A content block of another type, such as `tool_use`.
 *
 * `partial_json` is the JSON of the block as a text, or a part of the JSON: a client joins the
 * parts with the same `block`.
 */
export interface BlockPart {
  type: 'block'
  id: string
  seq: number
  block?: number
  partial_json: string
}

/** The socket no longer follows the conversation. */
export interface Closed {
  type: 'closed'
  request?: string
  conversation: string
}

/**
 * The `code` of an `error` frame. The codes are stable: a client may branch on a code.
 *
 * `retryable` says whether the same prompt can succeed later without a change. `meaning` is
 * the default message, for people: what happened, and what to do. Only programmers see the
 * messages of `invalid_json`, `invalid_frame` and `unknown_type`.
 */
export type ErrorCode = 'invalid_json' | 'invalid_frame' | 'unknown_type' | 'too_long' | 'id_conflict' | 'model_not_allowed' | 'not_found' | 'forgotten' | 'not_last' | 'gap' | 'not_running' | 'unauthenticated' | 'busy' | 'limit' | 'quota' | 'auth_unavailable' | 'store' | 'unavailable' | 'shutting_down' | 'bad_request' | 'credentials' | 'model_not_found' | 'request_too_large' | 'rate_limited' | 'prompt_too_long' | 'spend_limit' | 'upstream_error' | 'overloaded' | 'unreachable' | 'redirected' | 'untrusted' | 'timeout' | 'incomplete' | 'malformed' | 'interrupted' | 'refusal' | 'internal' | (string & {})

/** A conversation in a list. Times are in seconds since 1970. */
export interface ConversationItem {
  id: string
  title: string
  created: number
  updated: number
}

/** A page of the client's conversations. `next` is the `before` of the next page. */
export interface Conversations {
  type: 'conversations'
  request?: string
  items: ConversationItem[]
  next?: string
}

/** The conversation was deleted. */
export interface Deleted {
  type: 'deleted'
  request?: string
  conversation: string
}

/**
 * Terminal: the reply has ended. `seq` is that of the last piece, 0 if there is none.
 *
 * `thought`: seconds that the model thought; left out without thinking.
 */
export interface Done {
  type: 'done'
  id: string
  seq: number
  reason: string
  by?: 'client' | 'deleted' | 'disconnect' | 'replaced' | 'timeout' | 'shutdown' | (string & {})
  usage: Usage
  thought?: number
  saved?: false
}

/**
 * With `id`: the terminal of that generation. Without: a frame of the client was refused.
 *
 * `about` is then the `id` or the `conversation` of that frame, if the frame had one.
 */
export interface ErrorFrame {
  type: 'error'
  request?: string
  code: ErrorCode
  message: string
  id?: string
  seq?: number
  about?: string
  retryable: boolean
  retry_after?: number
  usage?: Usage
  thought?: number
  saved?: false
  ref: string
}

/**
 * The first frame of a socket whose client offered the subprotocol.
 *
 * `auth`: the client has to send `auth` first. `principal`: the client's, if known.
 * `models`: the models that a prompt can choose, the default first; left out with `auth`.
 */
export interface Hello {
  type: 'hello'
  protocol: 'wsserver.v1'
  auth?: true
  principal?: string
  models?: string[]
  limits: Limits
}

/**
 * The messages of a conversation, oldest first, without those of running generations.
 *
 * An `open` with this `before` gets older messages. It is left out if there are none.
 */
export interface History {
  type: 'history'
  request?: string
  conversation: string
  title: string
  messages: ({
    role: 'user' | 'assistant' | (string & {})
    content: string
    id: string
    partial?: string
    blocks?: Block[]
    model?: string
    usage?: Usage
    began?: number
    ended?: number
    thought?: number
  })[]
  running: string[]
  before?: number
}

/**
 * What the server accepts on one socket. Sizes are in bytes of UTF-8.
 *
 * `answer_size` is the largest frame that the server sends. `requests` is the number of
 * frames that may wait for an answer.
 */
export interface Limits {
  message_size: number
  prompt_size: number
  answer_size: number
  frame_rate: number
  frame_burst: number
  bad_frames: number
  requests: number
  generations_per_socket: number
  queue_size: number
}

/** The answer to `ping`. */
export interface Pong {
  type: 'pong'
  request?: string
}

/** The conversation has another title. */
export interface Renamed {
  type: 'renamed'
  request?: string
  conversation: string
  title: string
}

/**
 * The prompt was accepted, or found again. `queued` is the place of a prompt that waits.
 *
 * The next frames begin with the piece after `after`, 0 if left out. If another socket sent the
 * prompt, `prompt` is its text, and `retry_of` the turn that it replaces. `blocks` has the
 * types of the prompt's blocks, unless it is a single text block.
 */
export interface Start {
  type: 'start'
  request?: string
  id: string
  conversation?: string
  model: string
  queued?: number
  after?: number
  prompt?: string
  blocks?: string[]
  retry_of?: string
}

/** The answer to a `stop` with a `request`: these generations have ended. */
export interface Stopped {
  type: 'stopped'
  request?: string
  ids: string[]
}

/**
 * The same for the model's extended thinking.
 *
 * A frame with a `signature` has an empty text. It has the signature of the block, or a part.
 */
export interface Thinking {
  type: 'thinking'
  id: string
  seq: number
  block?: number
  text: string
  signature?: string
}

/**
 * Text up to and including piece `seq`: one piece, or several merged.
 *
 * `block` is the index of the text block in the reply; 0 if left out. A frame with a
 * `citation` has an empty text: the citation belongs to the block.
 */
export interface Token {
  type: 'token'
  id: string
  seq: number
  block?: number
  text: string
  citation?: Record<string, unknown>
}

/** Tokens spent. The counts of the cache are left out if 0, and `estimated` if false. */
export interface Usage {
  input_tokens: number
  output_tokens: number
  cache_creation_input_tokens?: number
  cache_read_input_tokens?: number
  estimated?: true
}
