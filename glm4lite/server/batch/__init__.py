"""OpenAI's batch files: each line of one is a request, each line of the other an answer, in the order they complete.

`lines` reads and writes them. Who answers is an `Answerer` (`running`): a model in this process (`local`), a server of
somebody's (`client`), or either of them in each worker of a Ray cluster (`cluster`).
"""
