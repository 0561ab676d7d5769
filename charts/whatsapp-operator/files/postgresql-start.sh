#!/bin/sh
# Starts PostgreSQL with one database and one user for the operator. It is ours, so that it
# does the same in the official image and in one made from a distribution's packages.
set -eu
umask 077
for bin in /usr/lib/postgresql/*/bin; do
  if [ -d "$bin" ]; then PATH=$bin:$PATH; fi
done
export PATH PGDATA=/data/pg

if [ -s "$PGDATA/PG_VERSION" ]; then
  have=$(cat "$PGDATA/PG_VERSION")
  want=$(postgres --version | sed 's/[^0-9]*\([0-9]*\).*/\1/')
  if [ "$have" != "$want" ]; then
    echo "The volume was written by PostgreSQL $have, and this image has PostgreSQL $want: set postgresql.image.tag to $have, or dump the database there and restore it into a new volume" >&2
    exit 1
  fi
else
  # In another folder first: what was interrupted is begun anew.
  rm -rf "$PGDATA.new"
  initdb -D "$PGDATA.new" -U postgres --auth-local=trust --auth-host=scram-sha-256 -E UTF8 --locale=C.UTF-8
  # The superuser is reached from inside the pod only.
  printf '%s\n' 'local all all trust' 'host whatsapp whatsapp all scram-sha-256' >"$PGDATA.new/pg_hba.conf"
  postgres --single -c exit_on_error=on -D "$PGDATA.new" postgres >/dev/null <<'SQL'
CREATE ROLE whatsapp LOGIN
CREATE DATABASE whatsapp OWNER whatsapp
SQL
  mv "$PGDATA.new" "$PGDATA"
fi

# At each start: the Secret may have changed, or have been lost and created again.
postgres --single -c exit_on_error=on -D "$PGDATA" postgres >/dev/null <<SQL
ALTER ROLE whatsapp PASSWORD '$(tr -d '\n' </passwords/password | sed "s/'/''/g")'
SQL

# SIGTERM would wait for all clients to leave; SIGINT ends their sessions.
postgres -c listen_addresses='*' -c unix_socket_directories=/tmp -c max_connections="$MAX_CONNECTIONS" &
server=$!
trap 'kill -INT $server' TERM INT
status=0
while kill -0 $server 2>/dev/null; do
  status=0
  wait $server || status=$?
done
exit $status
