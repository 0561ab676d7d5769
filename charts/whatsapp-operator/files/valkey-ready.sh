#!/bin/sh
# Succeeds when the server answers a user, which it does not while it reads its file.
set -eu
client=$(command -v valkey-cli || command -v redis-cli)
export REDISCLI_AUTH="$(cat /passwords/laravel)"
"$client" --user whatsapp-operator-laravel ping | grep -q PONG
