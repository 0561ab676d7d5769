#!/bin/sh
# Starts Valkey with the users that the operator and Laravel have, and no other. It is ours,
# so that it does the same in the official image and in one made from a distribution's packages.
set -eu
umask 077
server=$(command -v valkey-server || command -v redis-server) || {
  echo "This image has neither valkey-server nor redis-server: check valkey.image" >&2
  exit 1
}
waitaof=
case $server in */valkey-server) waitaof=+waitaof ;; esac # Redis before 7.2 does not know it

# Each line of the file is: user NAME RULES >PASSWORD RULES. The server gets a password's hash.
# Nobody can log in as default, but the server reads its own file as this user: without
# permissions it would skip every transaction there, which is what a script writes.
echo 'user default off resetpass ~* &* +@all' >/tmp/users.acl
while read -r user name rules; do
  hash=$(tr -d '\n' <"/passwords/${name#whatsapp-operator-}" | sha256sum | cut -c1-64)
  echo "$user $name ${rules%%>PASSWORD*}#$hash${rules#*>PASSWORD} $waitaof"
done </config/valkey-users.acl >>/tmp/users.acl

exec "$server" --dir /data --appendonly yes --appendfsync always --maxmemory-policy noeviction \
  --save '' --protected-mode no --aclfile /tmp/users.acl
