#!/bin/busybox sh
# Starts a lab guest's role. Its disk is shared by all guests and read-only: what is written goes to memory.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp LC_ALL=C
for d in /run /tmp /var/log /var/lib/redis /var/lib/nginx /dev/shm; do
    [ -d $d ] || busybox mkdir -p $d
    busybox mount -t tmpfs -o mode=1777 none $d
done
busybox ip link set lo up
for w in $(busybox cat /proc/cmdline); do
    case $w in
    irlm.role=*) role=${w#irlm.role=} ;;
    irlm.seed=*) seed=${w#irlm.seed=} ;;
    irlm.warm=*) warm=${w#irlm.warm=} ;;
    esac
done
busybox hostname "$role$seed"
case $role in
web) nginx -c /srv/nginx.conf ;;
db) redis-server --save '' --appendonly no --bind 127.0.0.1 --daemonize yes --dir /tmp --logfile /var/log/redis.log ;;
esac
# A guest that has run for a while has programs and libraries in its page cache.
busybox xargs busybox cat </srv/warm 2>/dev/null | busybox head -c "${warm:-70}m" >/dev/null
busybox stty -F /dev/ttyS1 raw -echo 115200
while :; do perl /srv/agent.pl "$role" "$seed" </dev/ttyS1 >/dev/ttyS1 2>/dev/ttyS0; busybox sleep 1; done
