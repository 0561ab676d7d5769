#!/bin/sh
# Succeeds when the server takes connections.
set -eu
for bin in /usr/lib/postgresql/*/bin; do
  if [ -d "$bin" ]; then PATH=$bin:$PATH; fi
done
exec pg_isready -q -h 127.0.0.1 -U whatsapp -d whatsapp
