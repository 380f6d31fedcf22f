"""Chats over plain HTTP.

===========  ================================================================
``chats``    prompts, resumes and stops of all dialects over HTTP
``http``     their bodies, statuses and headers
``replies``  one reply as the body of one response
===========  ================================================================
"""
