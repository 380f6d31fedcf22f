// Content blocks, as in the Messages API: https://platform.claude.com/docs/en/api/messages

/** Text of a prompt or a reply. */
export interface TextBlock {
  type: 'text'
  text: string
  /** What the model cites, as in the Messages API. */
  citations?: Record<string, unknown>[]
}

/** Extended thinking. The API accepts it back only with its `signature`. */
export interface ThinkingBlock {
  type: 'thinking'
  thinking: string
  signature?: string
}

/** Extended thinking that only the API can read. */
export interface RedactedThinkingBlock {
  type: 'redacted_thinking'
  data: string
}

/** A call of a tool, with its `input`. */
export interface ToolUseBlock {
  type: 'tool_use'
  id: string
  name: string
  input: Record<string, unknown>
}

/** The result of a tool. */
export interface ToolResultBlock {
  type: 'tool_result'
  tool_use_id: string
  content?: string | AnyBlock[]
  is_error?: boolean
}

/** An image of a prompt. */
export interface ImageBlock {
  type: 'image'
  source: Source
}

/** A PDF or a text of a prompt. */
export interface DocumentBlock {
  type: 'document'
  source: Source
  title?: string
  context?: string
  citations?: { enabled?: boolean }
}

/** The place of an image or a document. */
export type Source =
  | { type: 'base64', media_type: string, data: string }
  | { type: 'url', url: string }
  | { type: 'file', file_id: string }
  | { type: 'text', media_type: string, data: string }
  | { type: 'content', content: string | AnyBlock[] }

/** A block of a reply or a history. Replies of the API may also have blocks of other types: skip them. */
export type Block =
  | TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock | ImageBlock | DocumentBlock

/** A block of a prompt: one of these, or any other of the API with its keys. */
export type AnyBlock = Block | { type: string, [key: string]: unknown }
