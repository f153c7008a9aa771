# Sourced in an empty directory: a file of each kind, and contents around each size at which they are kept another way.
: >empty
for size in 1 4095 4096 4097 65536 65537 200000; do head -c $size /dev/urandom >random-$size; done
for size in 4097 8192 65536 65537 131072 1000001; do yes abcdefgh | head -c $size >text-$size || true; done
for size in 3900 3968 4020 4031 4032 4033 4080; do yes x | head -c $size >short-$size || true; done
# Half of it can be compressed.
{ head -c 70000 /dev/urandom; head -c 70000 /dev/zero; head -c 70000 /dev/urandom; } >mixed
truncate -s 30M sparse
printf hello | dd of=sparse bs=1 seek=20000000 conv=notrunc status=none
truncate -s 10M hole
ln text-65536 hard
ln random-4095 hard-short
ln -s text-65536 link
ln -s "$(printf 'a%.0s' {1..4000})" long-link
ln -s /outside/../../x outside
mkfifo fifo
mknod null c 1 3
mknod disk b 259 1048000
touch "$(printf 'n%.0s' {1..255})" $'new\nline' -- -dash
mkdir -p many deep/a/b/c/d/e/f/g empty-directory
(cd many && for i in {1..700}; do echo $i >file-number-$i; done)
setfattr -n user.x -v hello text-65536
setfattr -n user.empty text-4097
setfattr -n user.big -v "$(head -c 3000 /dev/zero | tr '\0' v)" short-4020
setfattr -n user.directory -v yes many
setcap cap_net_raw+ep text-8192
chmod 4755 text-65537
chmod 2711 random-1
chmod 1777 many
chmod 000 random-4096
chown 70000:80000 random-4096
chown -h 1:2 link
touch -d '1960-01-02 03:04:05.123456789' empty
touch -d '2200-01-02 03:04:05.5' random-1
touch -h -d '2001-01-01 01:01:01.5' link
touch -d '2010-01-01 00:00:00.000000001' many deep
