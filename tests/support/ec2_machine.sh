#!/bin/bash
# The first process of a machine of `ec2_world`: it makes the machine's own disk and users, runs the user data, serves
# SSH, and collects what its children leave behind. It lives in namespaces of its own; with it everything there ends.
# ec2_machine.sh NAME KEY(file) USERDATA(file) ENV(file) READONLY(folders, one a line, in a file) CONSOLE(file)
set -eu
name=$1 key=$(cat "$2") data=$(cat "$3") env=$(cat "$4") image=$(cat "$5")
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

mount --make-rprivate /
hostname "$name"

# What the machine's image holds comes from outside and cannot be written.
mount -t tmpfs -o mode=755 image /mnt
number=0
while IFS= read -r folder; do
    mkdir /mnt/$number && mount --bind "$folder" /mnt/$number
    mount -o remount,bind,ro /mnt/$number
    number=$((number + 1))
done <<<"$image"

# A disk of its own where the machines of this world would else meet.
mkdir /mnt/etc && cp -a /etc/. /mnt/etc/
for folder in /tmp /var/tmp /root /home /run /work /opt; do
    if [ -d $folder ]; then mount -t tmpfs -o mode=755 disk $folder; fi
done
chmod 1777 /tmp /var/tmp
mount -t tmpfs -o mode=1777,size=1g shm /dev/shm
mkdir -p /run/etc /run/sshd && cp -a /mnt/etc/. /run/etc/ && mount --bind /run/etc /etc
echo "$name" >/etc/hostname
printf '127.0.0.1 localhost\n%s %s\n' "${name#ip-}" "$name" | sed '2s/-/./;2s/-/./;2s/-/./' >/etc/hosts
: >/etc/resolv.conf
echo 'ubuntu:x:60017:60017::/home/ubuntu:/bin/bash' >>/etc/passwd
echo 'ubuntu:x:60017:' >>/etc/group
echo 'ubuntu:*:19000:0:99999:7:::' >>/etc/shadow
install -d -o 60017 -g 60017 /home/ubuntu
install -d -o 60017 -g 60017 -m 700 /home/ubuntu/.ssh
number=0
while IFS= read -r folder; do
    mkdir -p "$folder" && mount --bind /mnt/$number "$folder"
    mount -o remount,bind,ro "$folder"
    if [ $number = 0 ]; then mkdir -p /opt/orch && mount --bind /mnt/$number /opt/orch; fi
    number=$((number + 1))
done <<<"$image"
umount -R /mnt

# User data as cloud-init has it: a script, run as root.
if [[ $data == '#!'* ]]; then
    printf '%s\n' "$data" >/run/user-data && chmod 700 /run/user-data && /run/user-data
fi

if [ -n "$key" ]; then
    printf '%s\n' "$key" >/home/ubuntu/.ssh/authorized_keys
    chown 60017:60017 /home/ubuntu/.ssh/authorized_keys && chmod 600 /home/ubuntu/.ssh/authorized_keys
fi
rm -f /etc/ssh/ssh_host_* && ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key
{
    printf 'Port 22\nHostKey /etc/ssh/ssh_host_ed25519_key\nPasswordAuthentication no\nUsePAM no\nPrintMotd no\n'
    printf 'MaxStartups 100\nSubsystem sftp internal-sftp\n'
    [ -z "$env" ] || printf 'SetEnv %s\n' "$env"
} >/etc/ssh/sshd_config
# Not this shell's own: it collects orphans, as an init does.
/usr/sbin/sshd -D -e &
while :; do wait -n || [ -e /proc/$! ] || exit 1; done
